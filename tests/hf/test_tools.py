"""What people do with a model works with a converted one: pipelines, Trainer, adapters, compilation, int8."""

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, pipeline

from bsbr import BSBRConfig, convert, revert
from bsbr.data.tokenizer import train_tokenizer
from bsbr.hf import BSBRCache, attention_modules, load_model

SPARSE = BSBRConfig(dense_below=0, block_size=8, top_k=1)


def test_pipeline(tiny):
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 4
    tokenizer = train_tokenizer([text], vocab_size=300)
    converted = convert(tiny("llama", vocab_size=len(tokenizer)), SPARSE)
    run = pipeline("text-generation", model=converted, tokenizer=tokenizer, device="cpu")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "return_tensors": True}
    texts = [text[:100], text[:230]]
    alone = [run(one, **settings)[0]["generated_token_ids"] for one in texts]
    inputs = tokenizer(texts[1], return_tensors="pt")["input_ids"]
    expected = converted.generate(inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=False)
    assert alone[1] == expected[0].tolist()
    assert [len(ids) for ids in alone] == [len(tokenizer(one)["input_ids"]) + 8 for one in texts]


class _Windows(Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def test_trainer_saves_and_resumes_exactly(tiny, tokens, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    start, windows = convert(tiny("llama"), SPARSE), _Windows(tokens(16, 40))

    def train(folder, steps, resume=False):
        model = copy.deepcopy(start)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2,
            learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=100, report_to="none", disable_tqdm=True,
            use_cpu=True, seed=0,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=windows).train(resume_from_checkpoint=resume)
        return model

    whole = train("whole", 4)
    train("parts", 2)
    resumed = train("parts", 4, resume=True)
    calibration = attention_modules(whole)[0].bsbr.calibration
    assert not torch.equal(calibration, attention_modules(start)[0].bsbr.calibration)
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(found, expected), name
    saved = load_model(tmp_path / "parts" / "checkpoint-4")
    assert torch.equal(attention_modules(saved)[0].bsbr.calibration, calibration)


def test_an_adapter_finds_its_converted_base_and_merges(tiny, tokens, logits, tmp_path):
    """With `AutoPeftModelForCausalLM` nobody can name the wrong base; calibration goes along where it is asked for."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    converted, ids = convert(tiny("llama"), SPARSE), tokens(2, 40)
    converted.save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["bsbr"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(base, settings)
    optimizer = torch.optim.SGD([x for x in adapted.parameters() if x.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    expected = logits(adapted.eval(), ids)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, ids), expected)
    assert (logits(converted, ids) - expected).abs().max() > 1e-3
    merged = loaded.merge_and_unload()
    assert type(merged) is type(converted)
    assert not torch.equal(
        attention_modules(merged)[0].bsbr.calibration, attention_modules(converted)[0].bsbr.calibration
    )
    merged.save_pretrained(tmp_path / "merged")
    again = load_model(tmp_path / "merged")
    assert (logits(again, ids) - expected).abs().max() <= 1e-4
    assert type(revert(again)) is type(tiny("llama"))


def test_an_adapter_never_names_a_base_with_another_attention(tiny, tokens, logits, tmp_path):
    """peft asks nothing of the model it loads, so what stands in an adapter must not be the dense original."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    tiny("llama").save_pretrained(tmp_path / "dense")
    dense = load_model(tmp_path / "dense")
    in_memory = convert(dense, SPARSE)
    in_memory.save_pretrained(tmp_path / "converted")
    saved = load_model(tmp_path / "converted")
    for name, model, base in (
        ("converted in memory", in_memory, None),
        ("with other settings in memory", convert(saved, BSBRConfig(dense_below=0, block_size=4, top_k=1)), None),
        ("reverted in memory", revert(saved), None),
        ("converted", saved, "converted"),
        ("dense", revert(in_memory), "dense"),
    ):
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        adapted.save_pretrained(tmp_path / "adapters" / name)
        if base is None:
            with pytest.raises(OSError, match="in memory: save it and load its folder"):
                peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters" / name)
        else:
            loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters" / name)
            assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / base)
            assert type(loaded.get_base_model()) is type(model)
    assert in_memory.name_or_path == dense.name_or_path, "other tools look for the tokenizer there"


@pytest.mark.filterwarnings("ignore")
def test_compiled_it_gives_the_same(tiny, tokens):
    """Without code generation, which takes long: what goes wrong with a graph goes wrong before it."""
    converted, ids = convert(tiny("llama", num_hidden_layers=1), SPARSE), tokens(2, 44)
    torch._dynamo.reset()
    compiled = torch.compile(converted, backend="eager")
    cached, plain = BSBRCache(converted.config), BSBRCache(converted.config)
    with torch.no_grad():
        assert (compiled(ids, use_cache=False).logits - converted(ids, use_cache=False).logits).abs().max() <= 1e-5
        for part in ids.split([39, 1, 1, 3], 1):
            found = compiled(part, past_key_values=cached, use_cache=True).logits
            assert (found - converted(part, past_key_values=plain, use_cache=True).logits).abs().max() <= 1e-5


def test_int8_weights_stay_as_they_are(tiny, tokens, logits):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, ids = copy.deepcopy(tiny("llama")), tokens(1, 50)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    kind = type(model.model.layers[0].mlp.up_proj.weight)
    assert kind is not torch.nn.Parameter
    exact = convert(model, BSBRConfig(dense_below=0, block_size=8, top_k=99))
    weight = exact.model.layers[0].mlp.up_proj.weight
    assert weight is model.model.layers[0].mlp.up_proj.weight
    assert (logits(exact, ids) - logits(model, ids)).abs().max() <= 1e-4
    assert torch.equal(logits(revert(exact), ids), logits(model, ids))
    text = convert(model, SPARSE).generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(
        text,
        convert(model, SPARSE).generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False),
    )
