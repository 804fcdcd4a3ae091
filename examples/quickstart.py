"""Convert the embedded model, calibrate it, compare it with the original, and let it write.

    python examples/quickstart.py

Takes well under a minute on a CPU and needs no network. Put a folder or hub name of your own in MODEL.
"""

import torch

import bsbr
from bsbr.data.embedded import EMBEDDED_MODEL, calibration_text, evaluation_texts
from bsbr.hf import load_model, load_tokenizer

MODEL = EMBEDDED_MODEL


def main() -> None:
    """Run the example."""
    original, tokenizer = load_model(MODEL), load_tokenizer(MODEL)
    config = bsbr.BSBRConfig(block_size=64, top_k=2, dense_below=192)
    model = bsbr.convert(original, config)  # shares the weights; `original` stays usable
    # Few tokens, so that the example is quick; leave both numbers out for a model that is to be used.
    bsbr.calibrate(model, calibration_text(), tokenizer=tokenizer, tokens=2048, length=1024, queries_per_head=64)

    book = evaluation_texts()["book"][0]
    ids = tokenizer(book[20_000:23_000], return_tensors="pt").input_ids[:, :640]
    with torch.no_grad():
        same = original(ids).logits.argmax(-1) == model(ids).logits.argmax(-1)
    exact = config.dense_below  # up to here every query reads its whole past
    print(f"same next token, first {exact} positions: {same[:, :exact].float().mean():.1%}")
    print(f"same next token, later positions: {same[:, exact:].float().mean():.1%}")

    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    print("the converted model goes on:", tokenizer.decode(written[0, ids.shape[1] :]))


if __name__ == "__main__":
    main()
