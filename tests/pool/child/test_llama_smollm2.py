"""A real chat model on the real engine."""

import pytest

from engine_driver import GREEDY, drain, loaded, smollm2_path
from llamaherd.transport.messages import Generate

#: Asked without the example, so small a model hesitates between two languages; with it, every token is a clear choice.
QUESTION = (
    {"role": "user", "content": "What is the capital of Italy?"},
    {"role": "assistant", "content": "The capital of Italy is Rome."},
    {"role": "user", "content": "What is the capital of France?"},
)


@pytest.mark.parametrize("flash_attn", ["auto", "off"])
def test_smollm2_knows_the_capital_of_france(flash_attn: str) -> None:
    with loaded(smollm2_path(), n_ctx=512, n_parallel=3, flash_attn=flash_attn) as engine:
        for number in range(3):
            engine.submit(Generate(request=number, messages=QUESTION, sampling=GREEDY, max_tokens=16))
        got = drain(engine)
    assert [got[number].text for number in range(3)] == ["The capital of France is Paris."] * 3
    assert got[0].reason == "stop"
