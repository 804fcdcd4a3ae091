"""The command line: helps quickly, refuses bad input in one line, does its work on a tiny model."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from bsbr.cli import COMMANDS, main
from bsbr.data.tokenizer import train_tokenizer

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 40


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny random GPT-2, its tokenizer, and a text of a few documents."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_head=2, n_embd=16, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    documents = [f"Chapter {i}. {TEXT}" for i in range(3)]
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))
    return folder


def evaluate(tiny, output, *more, lengths="16,32"):
    return [
        "evaluate", str(tiny / "model"), "--text", str(tiny / "text.txt"), "--calibrate", str(tiny / "text.txt"),
        "--output", str(output), "--block-size", "16", "--top-k", "1", "--window", "128", "--documents", "3",
        "--lengths", lengths, "--repeats", "2", *more,
    ]  # fmt: skip


def test_help_needs_neither_torch_nor_transformers():
    code = "import sys; from bsbr.cli import main\ntry: main(['evaluate', '--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert COMMANDS[command].HELP.split()[0] in capsys.readouterr().out


def test_evaluate_writes_the_published_files_and_a_report(tiny, tmp_path, capsys):
    assert main(evaluate(tiny, tmp_path / "r", lengths="16,32,64,128")) == 0
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert {
        "scaling_results.json", "scaling_exponents.json", "quality_results_wikitext.json", "similarity_metrics.json",
        "agreement_rates.json", "inference_time_vs_seq_length.png", "throughput_vs_seq_length.png",
        "speedup_vs_seq_length.png", "scaling_exponent_analysis.png", "perplexity_comparison_wikitext.png",
        "metrics_distribution.png", "agreement_rates.png", "report.html", "summary.md",
    } <= names  # fmt: skip
    agreement = json.loads((tmp_path / "r" / "agreement_rates.json").read_text())
    assert agreement["status"] == "complete"
    variants = {row["variant"] for row in agreement["rows"]}
    assert {"converted", "uncalibrated", "moba", "local", "states", "additive"} <= variants
    assert str(tmp_path) not in (tmp_path / "r" / "agreement_rates.json").read_text()
    before = (tmp_path / "r" / "report.html").read_bytes()
    assert main(["report", str(tmp_path / "r")]) == 0
    assert (tmp_path / "r" / "report.html").read_bytes() == before
    # a second run does not replace the first by accident
    assert main(evaluate(tiny, tmp_path / "r")) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_hub_model_is_evaluated_on_wikitext_103(tiny, tmp_path, monkeypatch):
    """The published experiment by name, with the hub and the data set played by local ones."""
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        lines = [line + "\n" for i in range(3) for line in ("", f" = Title {i} = ", "", TEXT)]
        return {"text": lines}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("bsbr.hf.loading._fetch", lambda name: tiny / "model")
    command = evaluate(tiny, tmp_path / "r")
    command[1] = "gpt2"
    del command[command.index("--text") : command.index("--text") + 2]
    assert main(command) == 0
    assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1", "test")]
    quality = json.loads((tmp_path / "r" / "quality_results_wikitext.json").read_text())
    assert quality["data"]["texts"]["wikitext"]["documents"] == 3
    assert quality["model"]["name"] == "gpt2"
    assert quality["original_perplexity"] > 1


def test_without_a_hub_the_published_experiment_says_what_is_missing(tiny, tmp_path, monkeypatch, capfd):
    def load_dataset(*names, split):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("bsbr.hf.loading._fetch", lambda name: tiny / "model")
    assert main(["evaluate", "gpt2", "--output", str(tmp_path / "r")]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "bsbr evaluate embedded" in error


def sweep(tiny, output, *more):
    return [
        "evaluate", str(tiny / "model"), "--sweep", "--text", str(tiny / "text.txt"), "--calibrate",
        str(tiny / "text.txt"), "--output", str(output), "--block-size", "16", "--budgets", "16,32", "--units", "16,8",
        "--lengths", "96", "--repeats", "2", "--calibration-tokens", "96", "--calibration-queries", "8", *more,
    ]  # fmt: skip


def test_a_sweep_writes_its_file_plots_and_report(tiny, tmp_path, capsys):
    assert main(sweep(tiny, tmp_path / "r")) == 0
    names = {path.name for path in (tmp_path / "r").iterdir()}
    plots = {"quality_vs_density.png", "kl_vs_time.png", "kl_by_position.png"}
    assert names == plots | {"sweep.json", "sweep_records.jsonl", "report.html", "summary.md"}
    content = json.loads((tmp_path / "r" / "sweep.json").read_text())
    assert content["status"] == "complete"
    assert content["config"]["units"] == [8, 16]
    assert content["protocol"]["calibration"]["tokens"] == 96
    assert "oracle" in capsys.readouterr().out
    assert main(sweep(tiny, tmp_path / "r", "--resume")) == 0
    again = json.loads((tmp_path / "r" / "sweep.json").read_text())
    assert again["digest"] == content["digest"]
    assert main(sweep(tiny, tmp_path / "r")) == 2
    assert "holds an earlier run. Add --resume or --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (("--top-k", "4"), "--top-k: a sweep has --budgets"),
        (("--budgets", "12"), "no multiple of the retrieval block"),
        (("--lengths", "48"), "is read exactly"),
        (("--lengths", "4096"), "128 positions"),
        (("--far", "drop"), "MoBA"),
    ],
)
def test_a_sweep_refuses_what_makes_no_sense_in_one_line(tiny, tmp_path, capsys, more, match):
    assert main(sweep(tiny, tmp_path / "r", *more)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert match in said[-1]
    assert said[-1].startswith("bsbr: error:")


def test_convert_saves_what_transformers_loads(tiny, tmp_path):
    text = str(tiny / "text.txt")
    made = [
        "convert",
        str(tiny / "model"),
        str(tmp_path / "c"),
        "--calibrate",
        text,
        "--block-size",
        "16",
        "--top-k",
        "1",
    ]
    assert main(made) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert model.config.model_type == "bsbr-gpt2"
    assert model.config.bsbr["block_size"] == 16


def test_convert_leaves_layers_out(tiny, tmp_path, capsys):
    made = ["convert", str(tiny / "model"), str(tmp_path / "c"), "--calibrate", "none", "--layers"]
    assert main([*made, "1"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "c").config.bsbr_layers == [1]
    assert main([*made, "5", "--overwrite"]) != 0
    assert "full-attention layers [0, 1], got 5" in capsys.readouterr().err


def test_finetune_saves_a_model_its_figures_and_a_plot(tiny, tmp_path, capsys):
    converted, output = tmp_path / "converted", tmp_path / "tuned"
    attention = ["--block-size", "16", "--top-k", "1", "--dense-below", "0", "--calibrate", "none"]
    assert main(["convert", str(tiny / "model"), str(converted), *attention]) == 0
    recipe = ["--length", "64", "--accumulation", "2", "--distill-tokens", "512", "--transfer-tokens", "256"]
    command = [
        "finetune",
        str(converted),
        str(output),
        "--text",
        str(tiny / "text.txt"),
        *recipe,
        "--eval-windows",
        "1",
    ]
    assert main(command) == 0
    assert "retrieval off, after" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "bsbr-gpt2"
    record = json.loads((output / "finetune.json").read_text())
    assert {row["stage"] for row in record["history"]} == {"transfer", "distill"}
    assert (output / "finetune.png").read_bytes().startswith(b"\x89PNG")
    assert main(command) == 2
    assert "holds an earlier run. Add --resume, or choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"--block-size": "0"}, "block_size must be an integer >= 1, got 0"),
        ({"--block-size": "2.5"}, "--block-size"),
        ({"--top-k": "-1"}, "top_k"),
        ({"--far": "nearby"}, "moments, mean, drop"),
        ({"--lengths": "64,4096"}, "128 positions"),
        ({"--lengths": "many"}, "--lengths"),
        ({"--repeats": "0"}, "--repeats"),
        ({"--window": "4096"}, "128 positions"),
        ({"--documents": "0"}, "documents"),
        ({"--text": "missing.txt"}, "no such file"),
        ({"--calibrate": "missing.txt"}, "no such file"),
        ({"--device": "tpu"}, "--device"),
        ({"--device": "cuda"}, "GPU" if not torch.cuda.is_available() else ""),
        ({"--dtype": "int4"}, "dtype"),
        ({"--converted": "missing"}, "missing"),
        ({"--wrong": "1"}, "--wrong"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny, tmp_path, capsys, change, match):
    if change == {"--device": "cuda"} and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    args = evaluate(tiny, tmp_path / "r")
    for flag, value in change.items():
        if flag in args:
            args[args.index(flag) + 1] = value
        else:
            args += [flag, value]
    check_refusal(args, match, capsys)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no text"),
        (b"   \n \n", "no text"),
        (b"It", "token"),
        (b"caf\xe9 au lait", "offset 3"),
    ],
)
def test_a_bad_text_is_named(tiny, tmp_path, capsys, content, match):
    (tmp_path / "bad.txt").write_bytes(content)
    args = evaluate(tiny, tmp_path / "r")
    args[args.index("--text") + 1] = str(tmp_path / "bad.txt")
    check_refusal(args, match, capsys)


def test_a_bad_model_is_named(tiny, tmp_path, capsys):
    args = evaluate(tiny, tmp_path / "r")
    for name, match in ((str(tmp_path / "none"), "none"), (str(tmp_path), "config.json")):
        check_refusal(["evaluate", name, *args[2:]], match, capsys)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (tiny / "model").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    check_refusal(["evaluate", str(damaged), *args[2:]], "damaged", capsys)


def test_an_output_that_cannot_be_written_is_named(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    check_refusal(evaluate(tiny, tmp_path / "file"), "is a file", capsys)
    check_refusal(evaluate(tiny, tmp_path / "file" / "below"), "cannot be written", capsys)


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    check_refusal(["report", str(tmp_path)], "result", capsys)
    (tmp_path / "agreement_rates.json").write_text("{broken")
    check_refusal(["report", str(tmp_path)], "agreement_rates.json", capsys)


def test_a_hub_name_without_a_hub_says_what_to_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    assert main(["evaluate", "gpt2", "--output", str(tmp_path / "r")]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "bsbr evaluate" in said or "--text" in said


def test_ctrl_c_keeps_what_was_measured_and_resume_goes_on(tiny, tmp_path):
    """In the evaluation of a model that was converted before."""
    output, converted = tmp_path / "r", tmp_path / "c"
    made = ["convert", str(tiny / "model"), str(converted), "--calibrate", "none", "--block-size", "16"]
    assert main([*made, "--top-k", "1"]) == 0
    words = evaluate(tiny, output, "--converted", str(converted))
    command = [sys.executable, "-m", "bsbr.cli", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    records = output / "records.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if records.exists() and records.read_text().count("\n") >= 4:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "--resume" in errors
    kept = records.read_text().splitlines()
    assert main([*words, "--resume"]) == 0
    assert records.read_text().splitlines()[: len(kept) - 1] == kept[:-1]
    assert json.loads((output / "agreement_rates.json").read_text())["status"] == "complete"
    assert not [path for path in output.iterdir() if path.name.startswith(".")]


def check_refusal(args: list[str], match: str, capsys) -> None:
    """The command exits with 2 and one line on standard error that holds `match`; no half-written file stays."""
    try:
        code = main(args)
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2, shown.err
    assert shown.err.startswith("bsbr: error: ")
    assert shown.err.count("\n") == 1
    assert len(shown.err) < 400
    assert match in shown.err
    assert "Traceback" not in shown.err + shown.out
    if "--output" in args:
        output = Path(args[args.index("--output") + 1])
        assert not output.is_dir() or not list(output.glob(".*"))
