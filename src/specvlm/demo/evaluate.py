"""Measure a demo model on layouts it never saw: ``python -m specvlm.demo.evaluate MODEL_DIR``.

Every answer is judged whole: one false, missing or unreadable sentence makes it wrong. The same questions are
asked again with blank pictures and with each other's, which shows how much can be guessed without looking.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from specvlm.demo.grammar import TYPES, ask, check
from specvlm.demo.scenes import Scene, render, split_scene

REPORT_NAME = "accuracy.json"
PICTURES = ("true", "blank", "shuffled")
_MAX_NEW_TOKENS = 224


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a held-out scene."""

    scene: Scene
    kind: str
    text: str


def held_out_questions(per_type: int, seed: int) -> list[Question]:
    """`per_type` questions of every type, each about a scene of its own."""
    rng = Random(f"evaluation {seed}")
    questions: list[Question] = []
    for kind in TYPES:
        while sum(question.kind == kind for question in questions) < per_type:
            scene = split_scene(rng, for_evaluation=True)
            if found := ask(scene, kind, rng):
                questions.append(Question(scene, kind, found[0]))
    return questions


def show(questions: Sequence[Question], pictures: str) -> list[Image.Image]:
    """The picture that goes with each question: its own ("true"), an empty one ("blank"), another's ("shuffled")."""
    if pictures == "blank":
        return [render(Scene((), question.scene.background)) for question in questions]
    shown = [render(question.scene) for question in questions]
    if pictures == "shuffled":
        by = len(shown) // 2
        return shown[by:] + shown[:by]
    return shown


@torch.inference_mode()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    *,
    batch: int = 80,
) -> list[str]:
    """Greedy answers to one question a picture, decoded in left-padded batches."""
    answers: list[str] = []
    for start in range(0, len(texts), batch):
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            for text in texts[start : start + batch]
        ]
        inputs = processor(
            images=list(pictures[start : start + batch]),
            text=[processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats],
            padding=True,
            return_tensors="pt",
        ).to(model.device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        decoded = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in decoded]
    return answers


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """The share of right answers by type, and over all."""
    right = [check(q.scene, q.kind, q.text, text) for q, text in zip(questions, answers, strict=True)]
    by_type = {
        kind: [ok for question, ok in zip(questions, right, strict=True) if question.kind == kind] for kind in TYPES
    }
    shares = {kind: round(sum(found) / len(found), 4) for kind, found in by_type.items()}
    return {**shares, "overall": round(sum(right) / len(right), 4)}


def evaluate(folder: Path, *, per_type: int = 80, seed: int = 0) -> dict[str, dict[str, float]]:
    """Accuracies by kind of picture and type of question of the model in `folder`, computed in fp32."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    questions = held_out_questions(per_type, seed)
    texts = [question.text for question in questions]
    return {
        pictures: accuracy(questions, answer(model, processor, show(questions, pictures), texts))
        for pictures in PICTURES
    }


def main() -> None:
    """Read the command line, measure, and write the report."""
    parser = argparse.ArgumentParser(description="Measure a demo model on held-out layouts.")
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--per-type", type=int, default=80, help="questions of each type")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and questions")
    parser.add_argument("--out", type=Path, help=f"file of the report ({REPORT_NAME} beside the model)")
    arguments = parser.parse_args()
    result = evaluate(arguments.model, per_type=arguments.per_type, seed=arguments.seed)
    report = {"questions_per_type": arguments.per_type, "seed": arguments.seed, "accuracy": result}
    text = json.dumps(report, indent=2) + "\n"
    (arguments.out or arguments.model / REPORT_NAME).write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
