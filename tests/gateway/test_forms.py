"""Forms (audio, images) find their model and lose no byte."""

from __future__ import annotations

import hashlib
import os

import openai
import pytest

from nimhost.entities import ServedModel
from nimhost.errors import BadRequest
from nimhost.gateway.bodies import MAX_MODEL_BYTES, MOST_PARTS, read_form
from tests.fakes.engine import FakeEngine
from tests.gateway.conftest import Door, G, engine_upstream

AUDIO = b"RIFF\x00\r\n--fake\r\n\r\n" + bytes(range(256)) * 300
FILE = b'Content-Disposition: form-data; name="file"; filename="model.wav"\r\nContent-Type: audio/wav\r\n\r\n' + AUDIO
MODEL = b'Content-Disposition: form-data; name="model"\r\n\r\nqwen'
LANGUAGE = b'Content-Disposition: form-data; name="language"\r\n\r\nmodel'


def form(*parts: bytes, boundary: bytes = b"xYz") -> bytes:
    return b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts) + b"--%b--\r\n" % boundary


@pytest.mark.parametrize(
    "parts",
    [(MODEL, FILE), (FILE, LANGUAGE, MODEL), (LANGUAGE, MODEL, FILE)],
    ids=["model-first", "model-last", "model-between"],
)
@pytest.mark.parametrize("boundary", [b"xYz", b"a b'()+_,-./:=?"])
def test_model_is_found_wherever_it_stands(parts: tuple[bytes, ...], boundary: bytes) -> None:
    body = form(*parts, boundary=boundary)
    quoted = boundary if boundary.isalnum() else b'"%b"' % boundary
    found = read_form(b"preamble\r\n" + body, b"multipart/form-data; boundary=" + quoted)
    assert found.model == "qwen"
    assert found.raw[found.start : found.end] == b"qwen"
    assert read_form(body, b"Multipart/Form-Data; charset=utf-8; BOUNDARY=%b; x=y" % quoted).model == "qwen"


@pytest.mark.parametrize("head", [b"name=model", b'NAME="model"', b'name="model"; x=y'])
def test_model_is_found_however_the_part_is_written(head: bytes) -> None:
    part = b"content-type: text/plain\r\ncontent-disposition: form-data; %b\r\n\r\nqwen" % head
    assert read_form(form(part), b"multipart/form-data; boundary=xYz").model == "qwen"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (form(MODEL), b"multipart/form-data"),
        (form(FILE, LANGUAGE), b"multipart/form-data; boundary=xYz"),
        (form(MODEL), b"multipart/form-data; boundary=other"),
        (form(MODEL)[:-20], b"multipart/form-data; boundary=xYz"),
        (form(MODEL + b"x" * MAX_MODEL_BYTES), b"multipart/form-data; boundary=xYz"),
        (form(MODEL + b"\xff\xfe"), b"multipart/form-data; boundary=xYz"),
        (form(b"x: " + b"y" * MAX_MODEL_BYTES + b"\r\n" + MODEL), b"multipart/form-data; boundary=xYz"),
        (form(*[LANGUAGE] * MOST_PARTS, MODEL), b"multipart/form-data; boundary=xYz"),
        (b"", b"multipart/form-data; boundary=xYz"),
        (b"--xYz", b"multipart/form-data; boundary=xYz"),
        (b"--xYz\r\n\r\n", b"multipart/form-data; boundary=xYz"),
    ],
)
def test_form_that_names_no_model_is_refused(body: bytes, kind: bytes) -> None:
    with pytest.raises(BadRequest):
        read_form(body, kind)


@pytest.mark.parametrize("path", [f"{G}/default/openai/-/v1/audio/transcriptions", "/v1/audio/transcriptions"])
@pytest.mark.parametrize("served", ["qwen", "qwen-served"], ids=["same-name", "other-name"])
async def test_form_reaches_the_engine_whole_under_the_served_name(
    door: Door, engine: FakeEngine, path: str, served: str
) -> None:
    door.route(engine_upstream(engine, served=(ServedModel("default/qwen", served),)))
    body = form(FILE, MODEL, LANGUAGE)
    reply = await door.ask("POST", path, body, ["Content-Type: multipart/form-data; boundary=xYz"])
    expected = form(FILE, MODEL.removesuffix(b"qwen") + served.encode(), LANGUAGE)
    assert engine.requests[-1].body == expected
    assert reply.json()["sha256"] == hashlib.sha256(expected).hexdigest()
    assert engine.requests[-1].header("content-type") == "multipart/form-data; boundary=xYz"


async def test_form_for_an_unknown_model_is_404_with_the_nearest(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine))
    body = form(MODEL.replace(b"qwen", b"qwne"), FILE)
    reply = await door.ask(
        "POST", "/v1/audio/transcriptions", body, ["Content-Type: multipart/form-data; boundary=xYz"]
    )
    assert reply.status == 404
    assert "default/qwen" in reply.json()["error"]["message"]
    assert not engine.requests


async def test_openai_sdk_transcribes(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine))
    audio = os.urandom(3_000_000)
    async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none") as client:
        heard = await client.audio.transcriptions.create(model="qwen", file=("a.wav", audio))
    assert heard.text == "heard by a"
    assert audio in engine.requests[-1].body
    assert b"qwen-served" in engine.requests[-1].body
