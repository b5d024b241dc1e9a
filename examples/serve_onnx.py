"""Serves an exported student over HTTP: requests that arrive together are answered in one pass.

    distill-nlp export runs/imdb/student/seed-42 --quantize int8 --data DIR
    pip install 'distill-nlp[export]' fastapi uvicorn
    python examples/serve_onnx.py runs/imdb/student/seed-42-onnx-int8 --port 8000
    curl -s localhost:8000/predict -H 'content-type: application/json' -d '{"texts": ["What a waste of two hours."]}'

`GET /health` answers 200 when the model has answered once. Too much in one request is refused with 413, too many
waiting ones with 503. It listens on this machine alone unless `--host` says otherwise, and keeps no text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, ConfigDict, ValidationError

from distill_nlp.errors import DistillError
from distill_nlp.inference import encoded_rows, predict_logits
from distill_nlp.lengths import longest_input
from distill_nlp.loading import check_classifier, load_config, load_tokenizer
from distill_nlp.onnx_model import load_for_inference

logger = logging.getLogger(__name__)
Answer = Callable[[list[str]], np.ndarray]
"""Texts -> (N, C) logits."""


@dataclass
class Limits:
    """What one request, one pass and the queue may hold.

    Args:
        texts: of a request.
        characters: of a text; the tokenizer cuts at the model's length in any case.
        bytes: of a request's body.
        waiting: texts in the queue.
        rows: of a pass.
        wait: seconds that a text waits for others to share its pass.
    """

    texts: int = 64
    characters: int = 20_000
    bytes: int = 1_000_000
    waiting: int = 1024
    rows: int = 32
    wait: float = 0.005


class Texts(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)
    texts: list[str]


class Batcher:
    """Collects texts of all requests that wait, and answers them together, one pass at a time."""

    def __init__(self, answer: Answer, limits: Limits) -> None:
        self._answer, self._limits = answer, limits
        self._waiting: asyncio.Queue[tuple[str, asyncio.Future]] = asyncio.Queue()

    async def ask(self, texts: list[str]) -> list[np.ndarray]:
        """The logits of each text; raises `asyncio.QueueFull` where too many are waiting."""
        if self._waiting.qsize() + len(texts) > self._limits.waiting:
            raise asyncio.QueueFull
        futures = [asyncio.get_running_loop().create_future() for _ in texts]
        for item in zip(texts, futures, strict=True):
            self._waiting.put_nowait(item)
        return await asyncio.gather(*futures)

    async def run(self) -> None:
        """Works until it is cancelled."""
        while True:
            batch = [await self._waiting.get()]
            await asyncio.sleep(self._limits.wait)
            while len(batch) < self._limits.rows and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            # A client that went away has cancelled its futures.
            batch = [(text, future) for text, future in batch if not future.done()]
            if not batch:
                continue
            try:
                # In a thread: the server goes on taking requests.
                found: Any = await asyncio.to_thread(self._answer, [text for text, _ in batch])
            except Exception as error:
                found = [error] * len(batch)
            for (_, future), value in zip(batch, found, strict=True):
                if future.done():
                    continue
                if isinstance(value, Exception):
                    future.set_exception(value)
                else:
                    future.set_result(value)


def make_app(folder: str, limits: Limits | None = None) -> FastAPI:
    """The application for an exported folder, or for a checkpoint; raises `DistillError` where it is no classifier."""
    limits = limits or Limits()
    config = load_config(folder)
    check_classifier(folder, config)
    model, tokenizer = load_for_inference(folder), load_tokenizer(folder, config=config)
    length = longest_input(model.config, tokenizer, None)
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    several = model.config.problem_type == "multi_label_classification"

    def answer(texts: list[str]) -> np.ndarray:
        return predict_logits(model, tokenizer, encoded_rows(tokenizer, texts, None, length), limits.rows)

    batcher = Batcher(answer, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        work = asyncio.create_task(batcher.run())
        await batcher.ask(["warm-up"])
        yield
        work.cancel()

    app = FastAPI(title="distill_nlp student", lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "labels": names}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        texts = await _texts(request, limits)
        try:
            found = await batcher.ask(texts)
        except asyncio.QueueFull:
            raise HTTPException(503, "too many texts are waiting", {"Retry-After": "1"}) from None
        except Exception as error:
            logger.exception("a pass failed")
            raise HTTPException(500, "the model failed on this pass") from error
        return {"predictions": [_named(logits, names, several) for logits in found]}

    return app


async def _texts(request: Request, limits: Limits) -> list[str]:
    """The texts of a request, within the limits; the body is read no further than they allow."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > limits.bytes:
            raise HTTPException(413, f"a request may have {limits.bytes:,} bytes")
    try:
        texts = Texts.model_validate(json.loads(body)).texts
    except (ValueError, RecursionError, ValidationError):
        raise HTTPException(422, 'the body must be JSON such as {"texts": ["a text"]}') from None
    if len(texts) > limits.texts:
        raise HTTPException(413, f"a request may have {limits.texts} texts, not {len(texts)}")
    if any(len(text) > limits.characters for text in texts):
        raise HTTPException(413, f"a text may have {limits.characters:,} characters")
    # Half of a surrogate pair is no character; the tokenizer would fail on it, and with it the whole pass.
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise HTTPException(422, "a text holds half of a surrogate pair, which is no Unicode character")
    return texts


def _named(logits: np.ndarray, names: list[str], several: bool) -> dict[str, Any]:
    """`label` and `score`, or all `labels` above 0.5, and the `scores` of all."""
    if several:
        scores = 1 / (1 + np.exp(-logits.astype(float)))
    else:
        powers = np.exp(logits.astype(float) - logits.max())
        scores = powers / powers.sum()
    all_scores = {name: round(float(score), 6) for name, score in zip(names, scores, strict=True)}
    if several:
        return {"labels": [name for name in names if all_scores[name] > 0.5], "scores": all_scores}
    best = names[int(scores.argmax())]
    return {"label": best, "score": all_scores[best], "scores": all_scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="that `distill-nlp export` wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    try:
        app = make_app(options.folder)
    except DistillError as error:
        parser.exit(error.exit_code, f"error: {error}\n")
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
