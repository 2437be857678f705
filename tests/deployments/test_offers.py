"""What a registry says about an image, under the whole loop: refused before a byte is pulled, and never held up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.deployments.logins import ngc_login
from nimhost.deployments.offers import Offers
from nimhost.errors import DiskFull, NotFound
from nimhost.host.disk import free_bytes
from nimhost.host.registry import Offer, Registries
from nimhost.refs import NGC_KEY, Ref
from tests.fakes.containers import fake_image
from tests.fakes.registry import FakeRegistry
from tests.support import eventually
from tests.world import MODELS, World

PLAN = "/apis/nimhost/v1/plan"
CUDA_99 = "NVIDIA_REQUIRE_CUDA=cuda>=99"
Json = dict[str, Any]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as opened:
        yield opened


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """Its GPUs have driver 550.90 with CUDA 12.4."""
    world = World(tmp_path / "world")
    world.gpus.settings = [replace(gpu, driver="550.90.07", cuda="12.4") for gpu in world.gpus.settings]
    world.registries = Registries()
    async with world:
        yield world


def published(world: World, registry: FakeRegistry, name: str, **said: Any) -> str:
    """An image that Docker could pull from that registry."""
    ref = registry.add(name, **said)
    world.docker.registry[ref] = fake_image(ref)
    return ref


def wish(ref: str) -> Json:
    repository, _, tag = ref.rpartition(":")
    executor = {"gpu": 1, "image_name": repository, "image_tag": tag, "health_check_path": "/health"}
    return {"config": {"engine": "generic", "model_spec": {}, "executor_config": executor}}


async def refused(world: World, ref: str, says: str) -> None:
    """By the deployment and by the plan of it, and nothing was fetched."""
    await world.deploy("one", image=ref)
    await world.wait("one", "ERROR", says)
    assert "pull" not in world.docker.calls
    found = (await world.http.post(PLAN, json=wish(ref))).json()
    assert (found["verdict"], says in found["reason"]) == ("refused", True), found


@pytest.mark.fault(11)
async def test_a_driver_too_old_for_an_image_is_found_before_it_is_pulled(world: World, registry: FakeRegistry) -> None:
    ref = published(world, registry, "nim/x:1", env=(CUDA_99,))
    await refused(world, ref, f"Image {ref} needs CUDA 99 or newer; driver 550.90.07 of this machine has CUDA 12.4")
    asked = len(registry.asked)
    world.daemon.reconciler.wake()
    await world.deploy("two", image=ref)
    await world.wait("two", "ERROR", "needs CUDA 99")
    assert len(registry.asked) == asked, "it is known"


@pytest.mark.fault(11)
async def test_a_plan_has_the_answer_of_the_registry(world: World, registry: FakeRegistry) -> None:
    ref = published(world, registry, "nim/x:1", env=(CUDA_99,), sizes=(5000,))
    found = (await world.http.post(PLAN, json=wish(ref))).json()
    assert (found["verdict"], "needs CUDA 99 or newer" in found["reason"]) == ("refused", True), found
    assert [place["download_bytes"] for place in found["disk"] if place["what"] == "image"] == [5000]
    dry = f"{MODELS}/deployments?dry_run=true"
    await world.post(f"{MODELS}/deployment-configs", {"name": "one", **wish(ref)["config"]})
    shown = await world.http.post(dry, json={"name": "one", "config": "one"})
    assert "needs CUDA 99 or newer" in shown.text, shown.text
    assert world.docker.calls.count("pull") == 0


async def test_an_image_for_other_machines_is_found_before_it_is_pulled(world: World, registry: FakeRegistry) -> None:
    ref = published(world, registry, "nim/x:1", machines=("arm64", "s390x"))
    await refused(world, ref, f"Image {ref} is made for arm64, s390x, and this machine is amd64.")


@pytest.mark.fault(17)
@pytest.mark.parametrize(("keeps", "times"), [(False, 2), (True, 3)])
async def test_an_image_without_room_is_found_before_it_is_pulled(
    world: World, registry: FakeRegistry, keeps: bool, times: int
) -> None:
    world.docker.keeps_packed = keeps
    await world.restart()
    world.docker.calls.clear()
    size = (free_bytes(Path("/")) or 0) // times + 2**30
    ref = published(world, registry, "nim/x:1", sizes=(1000, size))
    await refused(world, ref, f"No room for the image {ref}: about {size * times / 2**30:.1f} GiB at")
    found = (await world.http.post(PLAN, json=wish(ref))).json()
    (image,) = [place for place in found["disk"] if place["what"] == "image"]
    assert (image["download_bytes"], image["needed_bytes"]) == (size + 1000, (size + 1000) * times)


async def test_what_a_registry_says_anew_brings_a_refused_deployment_up(
    world: World, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nimhost.deployments.offers.KEEP_S", 0.1)
    ref = published(world, registry, "nim/x:1", machines=("arm64",))
    await refused(world, ref, "is made for arm64")
    registry.add("nim/x:1", machines=("arm64", "amd64"))

    async def looked() -> bool:
        world.daemon.reconciler.wake()
        return (await world.deployment("one") or {})["status"] == "READY"

    await eventually(looked)


FREE = 100 * 2**30


@pytest.mark.fault(17)
@pytest.mark.fault(20)
async def test_a_pull_that_had_room_when_it_began_goes_on_after_a_restart(
    world: World, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has come of it is not free any more, and Docker does not tell how much that is."""
    free = FREE
    monkeypatch.setattr("nimhost.deployments.readings.free_bytes", lambda path: free)
    world.docker.pull_hangs = True
    await world.deploy("one", image=published(world, registry, "nim/x:1", sizes=(FREE // 2,)))
    await eventually(lambda: "pull" in world.docker.calls)
    await world.stop()
    free, world.docker.pull_hangs = FREE // 2, False
    asked = len(registry.asked)
    await world.start()
    await world.wait("one", "READY")
    assert len(registry.asked) == asked, "all that it could say was known when the pull began"


@pytest.mark.fault(17)
async def test_a_pull_that_filled_the_disk_begins_again_by_itself_once_there_is_room(
    world: World, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = False
    monkeypatch.setattr(
        "nimhost.deployments.readings.free_bytes", lambda path: FREE if made or "pull" not in world.docker.calls else 1
    )
    world.docker.pull_error = DiskFull("no space left on device")
    await world.deploy("one", image=published(world, registry, "nim/x:1", sizes=(FREE // 2,)))
    await world.wait("one", "PENDING", "No room for the image")
    assert world.docker.calls.count("pull") == 1
    made, world.docker.pull_error = True, None
    world.daemon.reconciler.wake()
    await world.wait("one", "READY")


async def test_force_pulls_what_the_registry_speaks_against(world: World, registry: FakeRegistry) -> None:
    ref = published(world, registry, "nim/x:1", env=(CUDA_99,))
    await world.post(f"{MODELS}/deployment-configs", {"name": "one", **wish(ref)["config"]})
    await world.post(f"{MODELS}/deployments", {"name": "one", "config": "one", "force": True})
    await world.wait("one", "READY")


async def test_an_image_that_fits_is_pulled_once_its_registry_answered(world: World, registry: FakeRegistry) -> None:
    ref = published(world, registry, "nim/x:1", env=("NVIDIA_REQUIRE_CUDA=cuda>=12.1",))
    await world.deploy("one", image=ref)
    await world.wait("one", "READY")
    assert registry.asked[-1].startswith("nim/x/blobs/sha256:")
    assert world.docker.calls.count("pull") == 1


@pytest.mark.parametrize("silence", ["hangs", "refuses"])
async def test_a_registry_that_says_nothing_holds_up_no_pull(
    world: World, registry: FakeRegistry, silence: str
) -> None:
    assert world.registries is not None
    world.registries.limit_s = 0.3
    ref = published(world, registry, "nim/x:1", env=(CUDA_99,))
    if silence == "hangs":
        registry.hangs.set()
    else:
        registry.status = 403
    await world.deploy("one", image=ref)
    await world.wait("one", "READY", timeout_s=5)
    found = (await world.http.post(PLAN, json=wish(registry.ref("nim/y:1")))).json()
    assert found["verdict"] == "unknown", found  # how much memory it takes
    assert [place["needed_bytes"] for place in found["disk"] if place["what"] == "image"] == [None]
    assert any("what the image needs is known once it is here" in check["what"] for check in found["checks"])


async def test_a_deployment_can_go_while_its_registry_is_asked(world: World, registry: FakeRegistry) -> None:
    registry.hangs.set()
    await world.deploy("one", image=published(world, registry, "nim/x:1"))
    await world.wait("one", "PENDING", "Asking the registry of image 127.0.0.1")
    await world.delete("one")
    await world.gone("one")


async def test_a_restart_while_the_registry_is_asked_leaves_nothing_behind(
    world: World, registry: FakeRegistry
) -> None:
    registry.hangs.set()
    await world.deploy("one", image=published(world, registry, "nim/x:1"))
    await world.wait("one", "PENDING", "Asking the registry")
    await world.stop()
    registry.hangs.clear()
    await world.start()
    await world.wait("one", "READY")


async def test_a_private_image_is_asked_for_with_the_login_of_docker(world: World, registry: FakeRegistry) -> None:
    registry.login = ("me", "secret")
    world.docker.login_of[f"127.0.0.1:{registry.port}"] = registry.login
    await refused(world, published(world, registry, "nim/x:1", env=(CUDA_99,)), "needs CUDA 99")


async def test_the_key_of_ngc_is_for_its_own_registry_alone() -> None:
    asked: list[Ref] = []

    async def secret(ref: Ref) -> str:
        asked.append(ref)
        return "nvapi-1"

    assert await ngc_login("nvcr.io/nim/x:1", secret) == ("$oauthtoken", "nvapi-1")
    assert asked == [NGC_KEY]
    for image in ("nvcr.io.evil.test/x:1", "evil.test/nvcr.io/x:1", "nvcr.io", "vllm/vllm-openai:v1"):
        assert await ngc_login(image, secret) is None
    assert len(asked) == 1

    async def no_secret(ref: Ref) -> str:
        raise NotFound(f"Secret not found: {ref}.")

    assert await ngc_login("nvcr.io/nim/x:1", no_secret) is None


# --- how long an answer holds


class Asked:
    """A registry that says what a test wants."""

    def __init__(self) -> None:
        self.offer: Offer | None = Offer(architecture="amd64", download_bytes=7)
        self.times = 0

    async def __call__(self, image: str, architecture: str) -> Offer | None:
        self.times += 1
        await asyncio.sleep(0)
        return self.offer


async def test_an_answer_is_kept_and_an_old_one_holds_until_there_is_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, woken = Asked(), []
    offers = Offers(asked, lambda: woken.append(1))
    assert offers.of("x:1", "amd64") == (None, True)
    await offers.settled()
    assert (offers.of("x:1", "amd64"), len(woken)) == ((asked.offer, False), 1)
    assert offers.of("x:1", "amd64") == (asked.offer, False)
    assert asked.times == 1
    before = asked.offer
    monkeypatch.setattr("nimhost.deployments.offers.KEEP_S", -1)
    assert offers.of("x:2", "amd64") == (None, True)
    await offers.settled()
    asked.offer = None  # it does not answer any more
    assert offers.of("x:2", "amd64") == (before, False)
    await offers.settled()
    assert (offers.of("x:2", "amd64"), asked.times) == ((before, False), 3)


async def test_who_said_nothing_is_left_alone_for_a_while_and_then_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    asked.offer = None
    offers = Offers(asked, lambda: None)
    offers.of("x:1", "amd64")
    await offers.settled()
    for _ in range(3):
        assert offers.of("x:1", "amd64") == (None, False)
    assert asked.times == 1
    monkeypatch.setattr("nimhost.deployments.offers.ASK_AGAIN_S", -1)
    offers.of("y:1", "amd64")
    await offers.settled()
    assert offers.of("y:1", "amd64") == (None, True), "asked again, and that is waited for"
    await offers.close()


async def test_an_answer_that_nobody_wants_any_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    offers = Offers(asked, lambda: None)
    monkeypatch.setattr("nimhost.deployments.offers.KEEP_S", -1)
    offers.of("x:1", "amd64")
    await offers.settled()
    monkeypatch.setattr("nimhost.deployments.offers.KEEP_S", 60)
    monkeypatch.setattr("nimhost.deployments.offers.FORGET_S", 0)
    offers.of("x:2", "amd64")
    await offers.settled()
    assert offers.of("x:2", "amd64") == (asked.offer, False)
    assert offers.of("x:1", "amd64") == (None, True)
    await offers.close()


async def test_many_who_wait_for_long_do_not_make_each_other_ask_for_ever() -> None:
    asked = Asked()
    offers = Offers(asked, lambda: None)
    for _ in range(3):
        for number in range(1000):
            offers.of(f"x:{number}", "amd64")
        await offers.settled()
    assert asked.times == 1000


async def test_who_gives_up_waiting_stops_nobody_else() -> None:
    asked, answers = Asked(), asyncio.Event()

    async def slowly(image: str, architecture: str) -> Offer | None:
        await answers.wait()
        return asked.offer

    offers = Offers(slowly, lambda: None)
    assert offers.of("x:1", "amd64") == (None, True)
    waiting = asyncio.create_task(offers.settled())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    answers.set()
    await offers.settled()
    assert offers.of("x:1", "amd64") == (asked.offer, False)
