"""Options that can't be, or that change nothing, are one line that names them, before a model is read."""
import argparse
import sys
from pathlib import Path

import pytest
import torch

import sample
import train
from formats.files import InputError
from support.console import Number
from test_vlm import command

NUMBERS = [(module, option) for module in (train, sample) for option in module.make_parser()._actions
           if option.type in (int, float) or type(option.default) in (int, float)
           or isinstance(option.type, Number)]


@pytest.fixture(autouse=True)
def no_model(tmp_path, monkeypatch):
    """Fails where a model is read, or anything written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "build", None)
    monkeypatch.setattr(sample.VLM, "from_pretrained", None)
    yield
    assert not any(tmp_path.iterdir())


def refused(monkeypatch, capsys, module, *arguments) -> str:
    """The line with which a command line is refused."""
    assert command(monkeypatch, module, *arguments) == 2, arguments
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"{module.__name__}.py: error: "), error
    return error.partition("error: ")[2]


@pytest.mark.parametrize("module, option", NUMBERS, ids=lambda x: getattr(x, "dest", None))
def test_every_number_has_a_range(module, option, monkeypatch, capsys):
    kind, least, most = option.type
    flag = option.option_strings[0]
    assert option.default is None or least <= option.default <= most
    parse = module.make_parser().parse_args
    for text in ("nan", "inf", "-1e999", "1e300", str(10 ** 26), "", "many", str(least - 1), str(most + 1)):
        with pytest.raises(InputError, match=f"^{flag}: '{text}' is not .* from {least:,} to {most:,}"):
            parse([f"{flag}={text}"])
    assert refused(monkeypatch, capsys, module, flag, "nan").startswith(f"{flag}: 'nan' is not a")
    for value in (least, most):
        assert getattr(parse([f"{flag}={value}"]), option.dest) == kind(value)


@pytest.mark.parametrize("arguments, reason", (
    (["--layout", "image-text:1e999"], "--layout image-text:1e999: '1e999' is not a number from 1e-06 to "),
    (["--layout", f"text-image:{'9' * 400}"], "99' is not a number"),
    (["--layout", "image-text,image-text:2"], "image-text is named twice"),
    (["--prompt", "<image><image>"], "--prompt takes one <image>"),
    (["--device", "meta"], "--device meta: "), (["--device", "hpu"], "--device hpu: ")))
def test_other_values_that_can_not_be(arguments, reason, monkeypatch, capsys):
    assert reason in refused(monkeypatch, capsys, train, *arguments)


def test_an_adapter_that_no_memory_holds_is_one_line(monkeypatch, capsys):
    monkeypatch.undo()  # the backbones are read
    line = refused(monkeypatch, capsys, train, "--adapter-width", "65536", "--adapter-layers", "20")
    assert line.startswith("out of memory: try ")


@pytest.mark.parametrize("module, arguments, reason", (
    (train, ["--lora-alpha", "3"], "without --lora"),
    (train, ["--lora-targets", "all"], "without --lora"),
    (train, ["--lora-dropout", "0.1", "--lora-from", "folder"], "without --lora"),
    (train, ["--lora-on", "vit"], "without --lora or --lora-from"),
    (train, ["--lora-vit-blocks", "2", "--lora", "2"], "without --lora and --lora-on vit"),
    (train, ["--scenes", "9", "--data", "c.csv"], "with --data"),
    (train, ["--images", "folder"], "without --data"),
    (train, ["--val", "c.csv"], "without --data"),
    (train, ["--split-name", "test"], "without --data"),
    (train, ["--val-split", "test", "--data", "c.csv"], "without --val"),
    (train, ["--images", "folder", "--data", "{0..9}.tar"], "with shards, which hold their own"),
    (train, ["--buffer", "9", "--data", "c.csv"], "without shards"),
    (train, ["--features", "folder", "--data", "{0..9}.tar"], "with shards: they are more than can be kept"),
    (train, ["--features", "folder", "--no-cache-features"], "with --no-cache-features"),
    (train, ["--cache-features", "--train", "adapter,vit"], "where the whole encoder is trained: its "),
    (train, ["--lr", "0.1", "--from", "x", "--train", "llm"], "where neither the adapter nor a LoRA is "),
    (train, ["--lr-llm", "0.1", "--lora", "2"], "where the LLM isn't trained whole"),
    (train, ["--lr-vit", "0.1", "--train", "adapter,llm"], "where the encoder isn't trained whole"),
    (train, ["--split"], "without --from"),
    (train, ["--shard"], "without torchrun"),
    (train, ["--spell", "0.5", "--adapter", "mlp"], "to the mlp adapter, which has no queries"),
    (train, ["--adapter-dropout", "0.1", "--adapter", "twoway"], "to the twoway adapter"),
    (train, ["--shots", "2", "--from", "x"], "with --from: x has its own"),
    (train, ["--layer", "0", "--from", "x"], "with --from: x has its own"),
    (sample, ["--images", "folder", "a.png"], "without --data"),
    (sample, ["--save", "file", "a.png"], "without --data"),
    (sample, ["--workers", "7", "a.png"], "without --data"),
    (sample, ["--split-name", "test", "a.png"], "without --data"),
    (sample, ["--split-name", "test", "--data", "shapes"], "with the shapes world"),
    (sample, ["--images", "folder", "--data", "shapes"], "with the shapes world"),
    (train, ["--queries", "4", "--data", "c.csv"], "to the pixelshuffle adapter (the default with --data)"),
    (sample, ["--images", "folder", "--data", "{0..9}.tar"], "with shards"),
    (sample, ["--attention", "x.png", "--export", "y"], "with --export"),
    (sample, ["--precision", "float32", "--export", "y"], "with --export"),
    (sample, ["--show-prompt", "--data", "c.csv"], "with --data"),
    (sample, ["--attention", "seen.png", "--data", "c.csv"], "with --data"),
    (sample, ["--split", "a.png", "--attention", "seen.png"], "with --attention"),
    (sample, ["--raw-prompt", "a.png"], "without --prompt"),
    (sample, ["--temperature", "1", "--beams", "3", "a.png"], "with --beams"),
    (sample, ["--length-penalty", "0", "a.png", "--beams", "1"], "without --beams"),
    (sample, ["--top-k", "3", "a.png"], "without --temperature"),
    (sample, ["--top-p", "0.5", "a.png"], "without --temperature"),
    (sample, ["--seed", "3", "--beams", "3", "a.png"], "without --temperature")))
def test_an_option_that_means_nothing_is_refused(module, arguments, reason, monkeypatch, capsys):
    line = refused(monkeypatch, capsys, module, *arguments)
    assert line.startswith(f"{arguments[0]} means nothing {reason}")


@pytest.mark.parametrize("module, arguments", (
    (train, ["--adapter", "mlp", "--spell", "0", "--lora-dropout", "0", "--no-compile", "--seed", "0"]),
    (train, ["--data", "c.csv", "--scenes", "20000", "--buffer", "1000", "--lora-on", "llm"]),
    (train, ["--data", "{0..9}.tar", "--val", "c.csv", "--images", "folder", "--no-cache-features"]),
    (train, ["--from", "x", "--adapter", "qformer", "--spell", "1", "--split"]),
    (train, ["--lora-from", "folder", "--lora-on", "vit", "--train", "adapter,llm", "--lr-llm", "1e-5"]),
    (sample, ["a.png", "--top-p", "1", "--top-k", "0", "--beams", "1", "--no-split", "--attention", "x.png"]),
    (sample, ["a.png", "What is it?", "--raw-prompt", "--temperature", "1", "--seed", "3"])))
def test_an_option_may_say_its_default(module, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    module.read_options()


@pytest.mark.parametrize("arguments, adapter, lr, lora, targets", (
    ([], "qformer", 2e-3, None, "q,v"),
    (["--adapter", "mlp", "--lora", "4"], "mlp", 2e-3, 4, "q,v"),
    (["--data", "c.csv"], "pixelshuffle", 3e-3, 16, "all"),
    (["--data", "c.csv", "--adapter", "mlp", "--lora-targets", "q"], "mlp", 3e-3, 16, "q"),
    (["--data", "c.csv", "--adapter", "flamingo", "--lora", "0"], "flamingo", 1e-3, 0, "all"),
    (["--data", "c.csv", "--lr", "5e-4", "--train", "adapter,llm"], "pixelshuffle", 5e-4, None, "all"),
    (["--data", "c.csv", "--lora-from", "x"], "pixelshuffle", 3e-3, None, "all"),
    (["--data", "c.csv", "--from", "x"], "qformer", 2e-3, None, "q,v")))  # it has its own adapter
def test_captions_of_ones_own_have_other_defaults(arguments, adapter, lr, lora, targets, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    options = train.read_options()
    found = (options.adapter, options.lr, options.lora, options.lora_targets)
    assert found == (adapter, lr, lora, targets)


@pytest.mark.parametrize("arguments, parts, blocks", (
    ([], "llm,vit", 6),
    (["--lora", "4", "--lora-vit-blocks", "2"], "llm,vit", 2),
    (["--lora-on", "llm"], "llm", None),
    (["--lora-on", "llm,vit"], "llm,vit", None),
    (["--lora-targets", "gate"], "llm", None),  # which an encoder may not have
    (["--layer", "0"], "llm", None),
    (["--layer", "0,5"], "llm,vit", 6),
    (["--train", "adapter,vit"], "llm", None),
    (["--train", "adapter,llm"], "llm", None),
    (["--lora-from", "x"], "llm", None),
    (["--from", "x", "--lora", "4"], "llm", None)))
def test_the_encoders_last_blocks_learn_captions_of_ones_own(arguments, parts, blocks, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "c.csv", *arguments])
    options = train.read_options()
    assert (options.lora_on, options.lora_vit_blocks) == (parts, blocks)


@pytest.mark.parametrize("device, data, batch, shots, parts", (
    ("cpu", "c.csv", 64, 0, 4), ("cpu", "c.csv", 16, 0, 1), ("cpu", "c.csv", 24, 0, 1),
    ("cpu", "c.csv", 64, 2, 1), ("cpu", "shapes", 64, 0, 1), ("cuda", "c.csv", 64, 0, 1)))
def test_a_cpu_computes_sixteen_captions_at_a_time(device, data, batch, shots, parts, monkeypatch):
    args = argparse.Namespace(data=data, batch=batch, shots=shots)
    assert train.parts_of_a_step(args, torch.device(device)) == parts
    monkeypatch.setattr(train, "WORLD", 2)
    assert train.parts_of_a_step(args, torch.device(device)) == (2 if parts == 4 else 1)


def test_lists_may_have_spaces():
    parse = train.make_parser().parse_args
    args = parse(["--train", "adapter, llm", "--lora-targets", "q, v",
                  "--layout", "image-text:2, text-image:1"])
    assert (args.train, args.lora_targets) == ("adapter,llm", "q,v")
    assert args.layout == "image-text:2,text-image:1"


def test_layers_may_be_counted_from_the_last():
    parse = train.make_parser().parse_args
    assert parse(["--layer", "-2,-5"]).layer == [-2, -5] and parse(["--layer", "-2"]).layer == -2


def test_a_name_of_a_picture_is_no_prompt(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "a photo.jpg", "no photo.JPG"])
    assert sample.read_options().pictures == ["a photo.jpg", "no photo.JPG"]
    monkeypatch.setattr(sys, "argv", ["sample.py", "a photo.jpg", "What is it?"])
    assert sample.read_options().prompt == "What is it?"


def test_a_resumed_run_stays_in_its_folder(tmp_path, monkeypatch, capsys):
    options = vars(train.make_parser().parse_args(["--lora-alpha", "3"]))  # of an older version
    monkeypatch.setattr(train, "saved_options", lambda *_: options)
    monkeypatch.setattr(train, "read_json", lambda _: {})
    assert "--out means nothing with --resume" in refused(
        monkeypatch, capsys, train, "--resume", "run", "--out", "other")
    for again in ([], ["--out", "run"], ["--lora-alpha", "3"]):
        monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "run/", *again])
        assert Path(train.read_options().out) == Path("run")
