"""Many pictures, many processes: torchrun, tar shards, features kept on disk."""
import gzip
import io
import itertools
import json
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import formats.shards
import sample
import train
from conftest import ROOT
from formats.shards import Shards, read_shard
from support.shapes import Shapes
from formats.files import InputError
from test_vlm import QFORMER, QUICK, QUICK_SET, SMALL, command, interrupt
from vit import ViT


def losses(run: str) -> list[float]:
    """Of each step, as metrics.jsonl tells; then those of the validations."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line[kind] for kind in ("loss", "val") for line in lines if kind in line]


# ---------------------------------------------------------------------------------------------------------
# Several processes

@pytest.mark.slow
@pytest.mark.parametrize("options, of_two, of_one", (
    (["--no-cache-features", "--lora", "2", "--lora-on", "llm,vit", "--shots", "2", "--accumulate", "2",
      "--layout", "image-text:0.4,text-image-text:0.3,text-image:0.3"], [], ["--accumulate", "4"]),
    (["--lora", "2", "--features", "features"], ["--shard"], []),
), ids=("replicated", "sharded"))
def test_two_processes_learn_what_one_does(options, of_two, of_one, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*SMALL, *QUICK, "--steps", "4", "--save-every", "2", "--log-every", "1",
               "--precision", "float32", *options]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = [*torchrun, ROOT / "train.py", *options, *of_two, "--out", "two"]
    done = subprocess.run(run, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4/4") == 1
    assert command(monkeypatch, train, *options, *of_one, "--out", "one") == 0
    assert losses("two") == pytest.approx(losses("one"), abs=1e-4) and len(losses("two")) == 6
    one, two = (load_file(f"{run}/checkpoint.safetensors") for run in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)
    assert {path.name for path in Path("one").iterdir()} == {path.name for path in Path("two").iterdir()}
    capsys.readouterr()
    assert command(monkeypatch, train, "--resume", "two") == 2
    assert "two: a run of 2 processes can't go on with 1: start as many" in capsys.readouterr().err


@pytest.mark.slow
def test_one_process_that_fails_ends_the_others_with_one_line(tmp_path):
    """Here it is the second, in its third step; the first waits for it in a sum."""
    (tmp_path / "fails.py").write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from formats.files import InputError
step = train.Run.step
def fail(run, number, *rest):
    if train.RANK and number == 2:
        raise InputError("only here")
    return step(run, number, *rest)
train.Run.step = fail
train.run(train.main)
""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for script, more, line in ((tmp_path / "fails.py", [], "only here"),
                               (ROOT / "train.py", ["--vit", "nowhere"], "nowhere")):
        run = [*torchrun, script, *SMALL, *QUICK, *more, "--out", tmp_path / f"run-{script.stem}"]
        done = subprocess.run(run, text=True, capture_output=True, timeout=100)
        said = re.findall(r"^\w+.py: error: (.*)", done.stderr, re.M)
        assert len(said) == 1 and line in said[0] and done.returncode, done.stderr


@pytest.mark.slow
def test_processes_end_with_their_launcher(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = [*SMALL, *QUICK, "--steps", "100000", "--save-every", "100000", "--out", tmp_path / "run"]
    launcher = subprocess.Popen([*torchrun, ROOT / "train.py", *options], stdout=subprocess.PIPE, text=True)
    while "step 4/" not in launcher.stdout.readline():
        pass
    launcher.kill()
    rest = launcher.stdout.read()  # ends when the last process has
    assert "goes on" in rest and (tmp_path / "run" / "checkpoint.safetensors").is_file()


def test_a_batch_is_cut_in_equal_parts(monkeypatch, capsys):
    monkeypatch.setattr(train, "WORLD", 3)
    assert command(monkeypatch, train, *QUICK) == 2
    assert "is no multiple of --accumulate 1 times 3 processes" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# Tar shards

SCENES = Shapes(120)


def write_tar(path: Path, members) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = member.size or len(content)
            tar.addfile(member, io.BytesIO(content))


def png(i: int) -> bytes:
    file = io.BytesIO()
    SCENES.picture(i).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Six shards of twenty scenes; half of the captions are JSON."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(6):
        scenes = range(20 * shard, 20 * shard + 20)
        texts = [("json", json.dumps({"caption": SCENES.scene(i).captions()})) if i % 2 else
                 ("txt", SCENES.scene(i).captions()[0]) for i in scenes]
        write_tar(folder / f"{shard:02}.tar", [
            member for i, (kind, text) in zip(scenes, texts)
            for member in ((f"a/{i:03}.png", png(i)), (f"a/{i:03}.{kind}", text.encode()))])
    return folder


def test_shards_go_with_a_table(shards, tmp_path):
    SCENES.picture(0).save(tmp_path / "a.png")
    (tmp_path / "c.csv").write_text("image,caption\na.png,a thing\n")
    for names in ([f"{shards}/*.tar", tmp_path / "c.csv"], [tmp_path / "c.csv", f"{shards}/05.tar"]):
        options = ["--data", names[0], "--val", names[1], "--images", tmp_path]
        args = train.make_parser().parse_args([str(option) for option in options])
        learned, val, _ = train.caption_sets(args)
        assert len(learned.paths) and len(val)


def test_shards_to_validate_on_are_all_read(shards, monkeypatch, capsys):
    options = ["--data", f"{shards}/{{00..03}}.tar", "--val", f"{shards}/0[45].tar"]
    args = train.make_parser().parse_args(options)
    learned, val, _ = train.caption_sets(args)
    assert len(learned.paths) == 4 and len(val) == 40
    score = ("--data", f"{shards}/0[45].tar", "--model", "assets/none")
    assert command(monkeypatch, sample, *score) == 2 and "assets/none" in capsys.readouterr().err


@pytest.mark.slow
def test_captions_that_should_not_match_are_of_other_pairs(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--adapter", "linear", "--data", f"{shards}/*.tar", *QUICK_SET, "--steps", "2", "--batch", "4",
               "--layout", "text-image"]
    arrange = train.arrange

    def watched(layout, captions, i, seed, epoch, prompt, others):
        if others is not None:
            assert others and i not in others
        return arrange(layout, captions, i, seed, epoch, prompt, others)

    monkeypatch.setattr(train, "arrange", watched)
    assert command(monkeypatch, train, *options, "--out", "run") == 0
    capsys.readouterr()
    assert command(monkeypatch, train, *options, "--accumulate", "4", "--out", "one") == 2
    assert "computed together, here one" in capsys.readouterr().err


def test_shards_are_listed_as_in_a_shell(shards):
    paths = [shards / f"{i:02}.tar" for i in range(6)]
    for names in (f"{shards}/{{00..05}}.tar", f"{shards}/*.tar",
                  f"{shards}/0{{0,1,2}}.tar,{shards}/0[345].tar"):
        assert Shards(names).paths == paths
    assert Shards(f"{shards}/{{05..00}}.tar").paths == paths[::-1]
    with pytest.raises(InputError, match="06.tar: no such shard"):
        Shards(f"{shards}/{{00..06}}.tar")


def test_a_pair_of_a_shard(shards):
    pair, second = itertools.islice(read_shard(shards / "01.tar"), 2)
    assert pair == "01.tar/a/020" and pair.said == SCENES.conversations(20)[:1] and not pair.fault
    assert second.said == SCENES.conversations(21) and second.file == png(21)
    source = Shards(f"{shards}/*.tar")
    assert source.picture(pair).tobytes() == SCENES.picture(20).tobytes() and not pair.file


def test_what_a_pair_says_and_what_it_is_called(tmp_path):
    """A text in place of a .json that is broken, without Notepad's first bytes; names of any bytes."""
    for n, broken in enumerate((b"{bad", b'["x"]', b"null", b'{"caption": ""}')):
        write_tar(tmp_path / f"{n}.tar",
                  [("a.png", png(0)), ("a.json", broken), ("a.txt", b"\xef\xbb\xbfone")])
        [pair] = read_shard(tmp_path / f"{n}.tar")
        assert (pair.said, pair.fault) == ([[("", "one")]], "")
    write_tar(tmp_path / "caf\udce9.tar", [("\udce8.png", png(0)), ("\udce8.txt", b"one"),
                                           ("\udce9.png", png(0)), ("\udce9.txt", b"two")])
    pairs = [*read_shard(tmp_path / "caf\udce9.tar")]
    assert pairs == ["caf\\udce9.tar/\\udce8", "caf\\udce9.tar/\\udce9"]
    assert data.draw_conversation(Shards(str(tmp_path / "caf\udce9.tar")), pairs[1], 0, 0) == [("", "two")]


def epochs(batches, size: int, count: int) -> list[list[str]]:
    names = [*itertools.chain.from_iterable(itertools.islice(batches, size * count // 4))]
    return [names[i:i + size] for i in range(0, size * count, size)]


@pytest.mark.parametrize("world", (1, 2, 3))
def test_each_pair_comes_once_an_epoch_to_one_process(world, shards):
    every = {f"{i // 20:02}.tar/a/{i:03}" for i in range(120)}
    source = [Shards(f"{shards}/*.tar", buffer=30) for _ in range(world)]
    parts = [epochs(of.batches(4, 7, 0, rank, world), 120 // world, 3) for rank, of in enumerate(source)]
    for epoch in zip(*parts):
        assert sorted(name for part in epoch for name in part) == sorted(every)
    assert parts[0][0] != parts[0][1] != sorted(parts[0][1]) and len(source[0]) == 120 // world
    later = Shards(f"{shards}/*.tar", buffer=30).batches(4, 7, 11, 0, world)
    assert next(later) == parts[0][44 // (120 // world)][44 % (120 // world):][:4]
    with pytest.raises(InputError, match="6 shards are too few for 7 processes"):
        next(source[0].batches(4, 7, 0, 0, 7))


@pytest.mark.slow
def test_training_on_shards(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shards)
    options = [*QFORMER, *QUICK_SET, "--data", "{00..05}.tar", "--buffer", "30", "--shots", "1",
               "--log-every", "1", "--layout", "image-text,text-image"]
    assert command(monkeypatch, train, *options, "--out", tmp_path / "whole", "--workers", "2") == 0
    interrupt(monkeypatch, *options, "--out", tmp_path / "parts")
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, train, "--resume", "parts") == 0
    assert losses("whole") == losses("parts") and len(losses("whole")) == 10
    lines = [json.loads(line) for line in Path("whole/captions-val.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == [f"00.tar/a/{i:03}" for i in range(8)]  # the first shard's
    assert all(line["references"] == SCENES.scene(i).captions()[:4 if i % 2 else 1]
               for i, line in enumerate(lines))
    capsys.readouterr()
    for arguments, message in ((["--data", shards / "00.tar"], "there is one shard alone"),
                               (["--data", shards / "*.tar", "--features", "f"], "more than can be kept"),
                               (["--data", shards / "*.tar", "--val", shards / "*.tar", "--images", "f"],
                                "with shards, which hold their own")):
        assert command(monkeypatch, train, *QFORMER, *QUICK_SET, *arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1


@pytest.mark.slow
def test_hostile_and_broken_shards(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    link, huge = tarfile.TarInfo("b.jpg"), tarfile.TarInfo("c.jpg")
    link.type, link.linkname, huge.size = tarfile.SYMTYPE, "/etc/passwd", 1 << 40
    good = [("g.png", png(3)), ("g.txt", b"a good pair")]
    write_tar(Path("in/0.tar"), [
        ("../../up.png", png(0)), ("../../up.txt", b"climbs"), ("/root/up.png", png(1)),
        ("/root/up.txt", b"absolute"), (link, b""), ("b.txt", b"a link"),
        ("d.png", b"no picture"), ("d.txt", b"text"), ("e.png", png(2)),
        ("e.json", b"[7"), ("f.png", png(2)), ("f.txt", b"\xff\xfe"), ("README.md", b"read me"), *good])
    faults = {pair.removeprefix("0.tar/"): pair.fault for pair in read_shard(Path("in/0.tar"))}
    assert [name for name, fault in faults.items() if not fault] == ["../../up", "/root/up", "d", "g"]
    assert "without a picture" in faults["b"] and "can't be read (JSONDecodeError" in faults["e"]
    assert "can't be read (UnicodeDecodeError" in faults["f"]
    whole = (shards / "01.tar").read_bytes()
    header = whole.index(b"a/030.png")
    for content, pairs in ((b"", 0), (b"no tar at all" * 99, 0), (whole[:header + 700], 10),
                           (whole[:header] + b"\xff" * 512 + whole[header + 512:], 10)):
        Path("in/1.tar").write_bytes(content)
        *found, last = read_shard(Path("in/1.tar"))
        assert len(found) == pairs and not any(pair.fault for pair in found) and "broken shard" in last.fault
    with tarfile.open("in/2.tar", "w") as tar:
        tar.addfile(huge)  # its terabyte is missing
    pair, = read_shard(Path("in/2.tar"))
    assert "says that it has 1,099,511,627,776 bytes" in pair.fault
    assert {path.name for path in tmp_path.rglob("*")} == {"in", "0.tar", "1.tar", "2.tar"}

    options = [*QFORMER, *QUICK_SET, "--val", shards / "00.tar", "--steps", "12"]
    data = f"in/1.tar,{shards}/01.tar,{shards}/02.tar"
    assert command(monkeypatch, train, *options, "--data", data, "--out", "run") == 0
    text, = Path("run/unreadable.txt").read_text().splitlines()  # though met in each epoch
    assert text.startswith("in/1.tar: broken shard (")
    capsys.readouterr()
    assert command(monkeypatch, train, *options, "--data", "in/1.tar,in/2.tar", "--out", "none") == 2
    assert "pictures can't be read; the last: in/" in capsys.readouterr().err


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


def pair_of(name: str, content: bytes = b"picture", caption: bytes = b"a cat") -> bytes:
    blocks = []
    for member, content in ((f"{name}.jpg", content), (f"{name}.txt", caption)):
        blocks += header(member, len(content)), content, b"\0" * (-len(content) % 512)
    return b"".join(blocks)


def sparse(name: str, size: int) -> bytes:
    """A GNU sparse member, all of it a hole: a header alone."""
    block = bytearray(header(name, 0, tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"%011o\0" % 0 * 2
    block[483:495] = b"%011o\0" % size
    block[148:156] = b"%06o\0 " % sum(block[:148] + b" " * 8 + block[156:])
    return bytes(block)


PAX = b"100000 path=" + b"a" * 99_987 + b"\n"  # one record
GLOBALS = header("g", 9_000, tarfile.XGLTYPE) + (b"9000 k=" + b"v" * 8_992 + b"\n").ljust(9_216, b"\0")


@pytest.mark.parametrize("content, fault", (
    (header("x", 100_000, tarfile.XHDTYPE) + PAX + b"\0" * (-len(PAX) % 512), "headers of more than 16,384"),
    (header("x", 100_000, tarfile.XGLTYPE) + PAX + b"\0" * (-len(PAX) % 512), "headers of more than 16,384"),
    (header("x", 99_840, tarfile.GNUTYPE_LONGNAME) + b"a" * 99_840, "headers of more than 16,384"),
    (header("x", 99_840, tarfile.GNUTYPE_LONGLINK) + b"a" * 99_840, "headers of more than 16,384"),
    (GLOBALS * 2, "headers of more than 16,384"),
    (header("x", -512, tarfile.XHDTYPE), "headers of more than 16,384"),
    (sparse("x.jpg", 1000), "x.jpg is a sparse file"),
    (header("x.jpg", -1024), "x.jpg says that it has -1,024 bytes"),
    (header("x.bin", -1024), "a member begins before the end of the last"),
    (pair_of("x", caption=b"a" * ((1 << 24) + 1)), "x.txt says that it has 16,777,217 bytes"),
    (pair_of("x", b" " * 5000) * 2, "the members of x say that they have 10,005 bytes")))
def test_a_shard_is_read_up_to_what_no_honest_one_has(content, fault, tmp_path, monkeypatch):
    """Headers that only tarfile would keep, sizes that nothing stands for, texts that nobody wrote."""
    if "members of" in fault:
        monkeypatch.setattr(formats.shards, "MOST_PAIR", 10_004, raising=False)
    (tmp_path / "a.tar").write_bytes(pair_of("good") + content + pair_of("later") + b"\0" * 1024)
    first, *rest = read_shard(tmp_path / "a.tar")
    assert first == "a.tar/good" and first.said == [[("", "a cat")]] and not first.fault
    assert f"a.tar: broken shard ({fault}" in rest[-1].fault and "a.tar/later" not in rest


def test_a_compressed_shard_unpacks_to_so_much(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(formats.shards, "MOST_PAIR", 1 << 20, raising=False)
    honest = (shards / "00.tar").read_bytes()
    for name in ("00.tar.gz", "00.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(honest[:30_000]) + gzip.compress(honest[30_000:]))
        pairs = [*read_shard(tmp_path / name)]
        assert [pair.file for pair in pairs] == [pair.file for pair in read_shard(shards / "00.tar")]
        assert len(pairs) == 20 and not any(pair.fault for pair in pairs)
    size = 20 << 20
    bomb = pair_of("good") + header("x.bin", size) + b"\0" * size + pair_of("later")
    (tmp_path / "bomb.tgz").write_bytes(gzip.compress(bomb))
    (tmp_path / "plain.tar").write_bytes(bomb)  # which has its bytes
    first, last = read_shard(tmp_path / "bomb.tgz")
    assert not first.fault and "broken shard (it unpacks to more than 100 times its size)" in last.fault
    assert not any(pair.fault for pair in read_shard(tmp_path / "plain.tar"))


def test_pairs_wait_in_so_many_bytes(shards, monkeypatch, capsys):
    """Fewer wait where they are large; all come, once an epoch, and a resumed run draws the same."""
    every = sorted(f"{i // 20:02}.tar/a/{i:03}" for i in range(120))
    most = 12 * len(png(0))
    read = []

    def counted(path):
        for pair in read_shard(path):
            read.append(pair)
            yield pair

    monkeypatch.setattr(formats.shards, "MOST_HELD", most, raising=False)
    monkeypatch.setattr(formats.shards, "read_shard", counted)
    source = Shards(f"{shards}/*.tar").batches(4, 7)
    names = []
    for _ in range(30):
        names += next(source)
        assert sum(len(pair.file) for pair in read if pair not in names) <= most
    assert sorted(names) == every and names != [str(pair) for pair in read[:120]]
    assert next(Shards(f"{shards}/*.tar").batches(4, 7, 11)) == names[44:48]
    _, out = Shards(f"{shards}/*.tar").held_out(20, 0)
    assert 2 < len(out) < 13 and f"{len(out)} pairs are read, no more" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# Features on disk

@pytest.mark.slow
def test_features_are_read_where_nothing_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        SCENES.picture(i).save(f"{i}.png")
    Path("c.csv").write_text("image,caption\n" + "".join(f"{i}.png,a picture {i}\n" for i in range(12)))
    Path("5.png").write_text("no picture")
    options = [*QFORMER, *QUICK_SET, "--data", "c.csv", "--val", "c.csv", "--val-size", "12",
               "--precision", "bfloat16", "--lora-on", "llm"]
    encoded = Counter()
    forward = ViT.forward

    def counted(vit, pixels, layer=None):
        encoded["pictures"] += bool(pixels.any()) and len(pixels)
        return forward(vit, pixels, layer)

    monkeypatch.setattr(ViT, "forward", counted)

    def run(out: str, *more) -> int:
        """How many pictures were encoded."""
        before = encoded["pictures"]
        assert command(monkeypatch, train, *options, *more, "--out", out) == 0
        return encoded["pictures"] - before

    assert run("memory", "--cache-features") == 22 and run("first", "--features", "kept") == 11
    assert run("second", "--features", "kept") == 0
    assert run("short", "--features", "kept", "--steps", "1", "--batch", "2") == 0  # less than an epoch
    assert losses("memory") == losses("first") == losses("second")
    file, = Path("kept").iterdir()
    stored = load_file(file)
    assert len(stored["rows"]) == 12 and stored["marks"].logical_not().nonzero().item() == 5
    assert "5.png: couldn't be read" in Path("second/unreadable.txt").read_text()
    for i, more in enumerate((["--layer", "-2"], ["--image-size", "48"], ["--precision", "float32"])):
        assert run(f"changed{i}", "--features", "kept", *more) == 11
    SCENES.picture(40).save("6.png")
    assert run("another", "--features", "kept") == 11 and len([*Path("kept").iterdir()]) == 5
    monkeypatch.setattr(train, "free_memory", lambda device: 0)
    assert run("from the file", "--features", "kept") == 0
    assert run("too large to keep", "--steps", "2") > 2 * 11  # in two steps, and twice to validate


def test_features_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = data.read_pictures

    def stopped(*arguments, **how):
        yield next(read(*arguments, **how))
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "read_pictures", stopped)
    assert command(monkeypatch, train, *SMALL, *QUICK, "--val-size", "80", "--features", "kept") == 130
    assert not any(Path("kept").iterdir())
