"""The image encoder and its preprocessing equal the reference implementations (see fixtures/make.py)."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from formats.files import InputError
from fixtures.compare import close
from fixtures.pictures import PROCESSING, photographs, picture
from formats.encoders import FAMILIES
from formats.pictures import rgb
from formats.pixels import PROCESSORS, Preprocessor
from vit import ViT, ViTConfig

ENCODERS = ("vit", "deit", "clip", "clip_vision", "siglip", "siglip_vision", "siglip2", "dinov2",
            "dinov2_swiglu", "dinov2_registers", "blip2_vision", "sam", "sam_vision")


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_encoder_equals_reference(name, fixtures):
    golden = load_file(fixtures / name / "golden.safetensors")
    vit = ViT.from_pretrained(str(fixtures / name), image_size=golden["pixels"].shape[-1])
    close(vit(golden["pixels"]), golden["last"])
    assert vit.config.hidden == golden["last"].shape[2] and vit.config.width == golden["layer1"].shape[2]
    # class and register tokens before the patches
    assert 0 <= golden["last"].shape[1] - vit.config.grid ** 2 <= 3
    for layer in (0, 1, -1, -2):
        close(vit(golden["pixels"], layer=layer), golden[f"layer{layer}"])
    several = vit(golden["pixels"], layer=[-1, 0, 1])
    close(several, torch.cat([golden[f"layer{layer}"] for layer in (-1, 0, 1)], -1))
    assert several.shape[1:] == vit.feature_shape([-1, 0, 1])
    for layer, blocks in ((None, 0), (None, 2), (None, 3), (-2, 1), ([-1, 0, 1], 2), ([2, 1], 2)):  # halfway
        begun = vit.begin(golden["pixels"], layer, blocks)
        assert begun.shape[1:] == vit.feature_shape(layer, blocks)
        assert torch.equal(vit.finish(begun, layer, blocks), vit(golden["pixels"], layer))
    with pytest.raises(InputError, match="layer 4"):
        vit(golden["pixels"], layer=4)


@pytest.mark.parametrize("name", [name for name in ENCODERS if not name.startswith("sam")])
@torch.no_grad()
def test_other_sizes_equal_reference(name, fixtures):
    """Fewer and more patches than the positions were made for, and sizes that the patch doesn't divide."""
    for size, last in load_file(fixtures / name / "resized.safetensors").items():
        vit = ViT.from_pretrained(str(fixtures / name), image_size=int(size))
        close(vit(vit.preprocess(picture(53, 37))[None]), last)


def test_image_size(fixtures):
    # 30 px, as its preprocessing makes; not 42
    assert ViT.from_pretrained(str(fixtures / "dinov2")).config.grid == 5
    assert ViT.from_pretrained(str(fixtures / "sam"), image_size=30).config.image_size == 30
    with pytest.raises(InputError, match="image_size 36: the encoder takes 30 px alone"):
        ViT.from_pretrained(str(fixtures / "sam"), image_size=36)
    with pytest.raises(InputError, match="image_size 5: the encoder takes 6 px, one patch, or more"):
        ViT.from_pretrained(str(fixtures / "vit"), image_size=5)


def test_naflex_sees_a_square_picture_as_the_reference_does(fixtures):
    """The reference keeps a picture's sides; here it becomes a square."""
    vit = ViT.from_pretrained(str(fixtures / "siglip2"))
    golden = load_file(fixtures / "siglip2" / "golden.safetensors")
    for i, size in enumerate((53, 20)):
        rows = vit.preprocess(picture(size, size)).unflatten(2, (5, 6)).unflatten(1, (5, 6))
        close(rows.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1), golden[f"preprocessed{i}"], 1e-5)
    assert vit.preprocess(picture(20, 61)).shape == (3, 30, 30)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "siglip2"])
def test_preprocess_equals_reference(name, fixtures):
    vit, golden = ViT.from_pretrained(str(fixtures / name)), load_file(fixtures / name / "golden.safetensors")
    for i, size in enumerate(((53, 37), (20, 61))):
        close(vit.preprocess(picture(*size)), golden[f"preprocessed{i}"], 1e-5)


@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"))
def test_preprocess_takes_every_mode(mode, fixtures):
    vit = ViT.from_pretrained(str(fixtures / "vit"))
    source = picture(53, 37)
    if mode == "I;16":
        converted = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
        source = source.convert("L")
    else:
        converted = source.convert("L").convert(mode) if mode in ("I", "F") else source.convert(mode)
        source = converted.convert("L") if mode in ("1", "L", "LA", "I", "F") else converted.convert("RGB")
    # a 16-bit picture must look like its 8-bit self, not be clipped white
    assert (vit.preprocess(converted) - vit.preprocess(source)).abs().max() < 0.05


def test_numbers_a_little_above_one_are_white():
    values = np.array([[0.0, 0.5, 1.0, 1.2]], np.float32)
    greys = np.asarray(rgb(Image.fromarray(values)))[0, :, 0]
    assert greys.tolist() == [0, 127, 255, 255]


@pytest.mark.parametrize("mode", ("RGBA", "LA", "P", "RGB"))
def test_transparent_is_white(mode, fixtures):
    """As the reference has it: half transparent is half white, and so is that of a palette or a colour."""
    vit, source = ViT.from_pretrained(str(fixtures / "clip")), Image.new("L", (40, 40), 60)
    if mode in ("RGBA", "LA"):
        source.putalpha(128)
        source, grey = source.convert(mode), 60 + (255 - 60) * 127 / 255
    else:
        source, grey = source.convert(mode), 255
        source.info["transparency"] = 60 if mode == "P" else (60, 60, 60)
    mean, std = (torch.tensor(vit.preprocess.settings[key]).view(3, 1, 1)
                 for key in ("image_mean", "image_std"))
    assert ((vit.preprocess(source) * std + mean) * 255 - grey).abs().max() <= 1


@pytest.mark.parametrize("name", PROCESSING)
def test_photographs_equal_reference(name, shared, fixtures):
    golden = load_file(fixtures / "real_pictures.safetensors")[name]
    settings = PROCESSORS[name] | PROCESSING[name]
    mean, std = (torch.tensor(settings.get(key, [0.5] * 3)).view(3, 1, 1)
                 for key in ("image_mean", "image_std"))
    preprocess = Preprocessor(settings, 224)
    for path, reference in zip(photographs(shared)[::3], golden):
        levels = (preprocess(Image.open(path)) * std + mean)[:, ::37, ::37] * 255
        if path.suffix == ".png" and name in ("ViT", "DeiT"):  # RGBA, which these of the reference don't take
            continue
        assert levels.shape == reference.shape and (levels - reference).abs().max() <= 1


def test_processor_that_is_not_known(fixtures, tmp_path):
    shutil.copytree(fixtures / "vit", tmp_path / "vit")
    file = tmp_path / "vit" / "preprocessor_config.json"
    for settings, message in ((dict(image_processor_type="ConvNextImageProcessor"),
                               "'ConvNext' is not one of ViT,"),
                              (dict(size=dict(height=30, width=20)), "is not a square"),
                              (dict(size=dict(shortest_edge=30)), "is not a square"),
                              (dict(size=dict(shortest_edge=30, longest_edge=60), do_center_crop=True,
                                    crop_size=30), "is no size"),
                              (dict(size="30"), "can't be read")):
        file.write_text(json.dumps(settings))
        with pytest.raises(InputError, match=message):
            ViT.from_pretrained(str(tmp_path / "vit"))
    # a file that says nothing, or none: the family's preprocessing, at the encoder's size
    file.write_text("{}")
    assert ViT.from_pretrained(str(tmp_path / "vit")).preprocess(picture(53, 37)).shape == (3, 30, 30)
    file.unlink()
    assert ViT.from_pretrained(str(tmp_path / "vit")).preprocess(picture(53, 37)).shape == (3, 30, 30)


def test_config_defaults_are_the_references():
    """Public files leave keys out."""
    def config(family: str, file: dict) -> ViTConfig:
        return ViTConfig(**FAMILIES[family].config(file))

    large = dict(hidden_size=1024, num_attention_heads=16, patch_size=14)
    openai = config("clip", dict(vision_config=large))
    assert (openai.activation, openai.eps, openai.patch_size, openai.mlp) == ("quick_gelu", 1e-5, 14, 3072)
    assert config("clip", dict(vision_config=dict(hidden_act="gelu"))).activation == "gelu"
    # where both are there, the reference follows the second, with its defaults
    both = dict(vision_config=dict(hidden_act="gelu", hidden_size=1024),
                vision_config_dict=dict(hidden_size=1152))
    clip = config("clip", both)
    assert (clip.width, clip.activation) == (1152, "quick_gelu")
    siglip = config("siglip", dict(vision_config=dict(image_size=384, patch_size=14)))
    assert (siglip.grid, siglip.activation, siglip.eps) == (27, "gelu_pytorch_tanh", 1e-6)
    giant = config("dinov2", dict(hidden_size=1536, mlp_ratio=4, use_swiglu_ffn=True,
                                           hidden_act="gelu"))
    assert (giant.mlp, giant.activation) == (4096, "silu")
    rounded = config("dinov2", dict(hidden_size=20, num_attention_heads=2, use_swiglu_ffn=True))
    assert rounded.mlp == 56  # two thirds of 80, up to a multiple of 8
    # the first is unread
    sam = config("sam", dict(vision_config=dict(intermediate_size=6144, mlp_dim=None)))
    assert (sam.mlp, sam.grid, sam.hidden, sam.window) == (3072, 64, 256, 14)
    assert sam.global_blocks == (2, 5, 8, 11)
    eva = config("blip-2", {})
    assert (eva.width, eva.layers, eva.heads, eva.mlp, eva.patch_size) == (1408, 39, 16, 6144, 14)


@torch.no_grad()
def test_half_precision(fixtures):
    """bfloat16 stays near: also positions added and interpolated at load, and SAM's relative ones."""
    for name in ("dinov2_registers", "sam"):
        pixels = torch.randn(1, 3, 30, 30, generator=torch.Generator().manual_seed(0))
        whole, half = (ViT.from_pretrained(str(fixtures / name), dtype)
                       for dtype in (torch.float32, torch.bfloat16))
        assert all(p.dtype == torch.bfloat16 for p in half.parameters())
        assert (whole(pixels) - half(pixels).float()).abs().mean() < 0.05


@torch.no_grad()
def test_real_checkpoint_equals_reference(shared, fixtures):
    golden = load_file(fixtures / "real.safetensors")
    vit = ViT.from_pretrained(str(shared / "checkpoints" / "vit-tiny"))
    pixels = vit.preprocess(picture(300, 200))[None]
    close(vit(pixels)[:, ::20], golden["vit-tiny.last"])
    close(vit(pixels, layer=-2)[:, ::20], golden["vit-tiny.layer-2"])
