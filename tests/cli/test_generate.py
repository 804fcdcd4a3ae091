"""`bsbr generate` writes what the model's own generate writes, and says in one line what is wrong."""

import io
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bsbr import BSBRConfig, convert
from bsbr.cli import main
from bsbr.data.tokenizer import train_tokenizer
from bsbr.hf import load_model, load_tokenizer

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders with a tiny random model: dense, converted, and converted to states alone."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        dense = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_head=2, n_embd=16, n_positions=160))
    models = {
        "dense": dense,
        "bsbr": convert(dense, BSBRConfig(block_size=8, top_k=1, dense_below=0)),
        "states": convert(dense, BSBRConfig(block_size=8, top_k=0, dense_below=0)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def generate(folder, *more):
    return ["generate", str(folder), "--max-new-tokens", "20", *more]


@pytest.mark.parametrize(
    ("name", "cache", "said"),
    [("bsbr", "full", "BSBR"), ("bsbr", "offload", "BSBR"), ("states", "states", "BSBR"), ("dense", "full", "dense")],
)
def test_it_writes_the_greedy_text_and_one_line_of_figures(folders, capsys, name, cache, said):
    assert main(generate(folders / name, "--prompt", TEXT[:200], "--cache", cache)) == 0
    shown = capsys.readouterr()
    model, tokenizer = load_model(folders / name), load_tokenizer(folders / name)
    ids = tokenizer(TEXT[:200], return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=False, pad_token_id=0)
    text = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert shown.out.rstrip("\n") == text.rstrip("\n")
    line = shown.err.strip().splitlines()[-1]
    assert "tokens/s" in line
    assert f"{said} cache" in line


def test_a_file_a_pipe_and_a_prompt_are_the_same_text(folders, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT[:150])
    outputs = []
    for source in (["--prompt", TEXT[:150]], ["--file", str(tmp_path / "text.txt")], ["--file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT[:150].encode())))
        assert main(generate(folders / "bsbr", *source)) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2]


def test_draws_follow_the_seed(folders, capsys):
    def draw(seed):
        settings = ["--temperature", "5", "--top-p", "0.9", "--seed", seed]
        assert main(generate(folders / "bsbr", "--prompt", TEXT[:80], *settings)) == 0
        return capsys.readouterr().out

    assert draw("1") == draw("1")
    assert draw("1") != draw("2")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (["--prompt", ""], "no token"),
        ([], "--prompt"),
        (["--prompt", "a", "--file", "b"], "--file"),
        (["--file", "missing.txt"], "no such file"),
        (["--prompt", "a", "--max-new-tokens", "0"], "at least 1"),
        (["--prompt", "a", "--max-new-tokens", "1000"], "160 positions"),
        (["--prompt", "a", "--max-length", "0"], "--max-length 0"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature"),
        (["--prompt", "a", "--top-p", "0"], "--top-p"),
        (["--prompt", "a", "--top-p", "1.5"], "--top-p"),
        (["--prompt", "a", "--cache", "disk"], "full, offload, states"),
        (["--prompt", "a", "--cache", "states"], "top_k 1"),
        (["--prompt", "a", "--dtype", "int4"], "dtype"),
        (["--prompt", "a", "--device", "tpu"], "--device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folders, capsys, change, match):
    try:
        code = main(generate(folders / "bsbr", *change))
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("bsbr: error: ")
    assert match in shown.err
    assert not shown.out


def test_a_model_that_is_not_converted_has_no_other_cache(folders, capsys):
    assert main(generate(folders / "dense", "--prompt", "a", "--cache", "offload")) == 2
    assert "bsbr convert" in capsys.readouterr().err


def test_ctrl_c_ends_with_130(folders):
    command = [sys.executable, "-m", "bsbr.cli", "generate", str(folders / "bsbr"), "--prompt", "It was"]
    more = ["--max-new-tokens", "50000", "--max-length", "60000", "--temperature", "3"]
    with subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode().strip().splitlines()[-1].startswith("bsbr: error: interrupted")
