"""Vision-language models that answer faster without one token of the answer changing.

model = specvlm.load("llava-hf/llava-1.5-7b-hf", draft="ngram")
print(model.ask("photo.jpg", "What is on the table?"))
"""

from specvlm.config import GenerateConfig
from specvlm.decoder import Answer, SpecVLM, decode
from specvlm.loading import load
from specvlm.state import Emitted
from specvlm.stats import Stats

__all__ = ["Answer", "Emitted", "GenerateConfig", "SpecVLM", "Stats", "decode", "load"]
