"""The image encoder and its preprocessing equal the reference implementations (see fixtures/make.py)."""
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data import InputError
from fixtures.compare import close
from fixtures.pictures import picture
from vit import ViT

ENCODERS = ("vit", "deit", "clip", "clip_vision", "siglip", "siglip_vision", "dinov2", "dinov2_swiglu",
            "dinov2_registers", "blip2_vision", "sam", "sam_vision")


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_encoder_equals_reference(name, fixtures):
    golden = load_file(fixtures / name / "golden.safetensors")
    vit = ViT.from_pretrained(str(fixtures / name), image_size=golden["pixels"].shape[-1])
    close(vit(golden["pixels"]), golden["last"])
    assert vit.config.hidden == golden["last"].shape[2] and vit.config.width == golden["layer1"].shape[2]
    assert 0 <= golden["last"].shape[1] - vit.config.grid ** 2 <= 3  # class and register tokens before the patches
    for layer in (0, 1, -1, -2):
        close(vit(golden["pixels"], layer=layer), golden[f"layer{layer}"])
    with pytest.raises(InputError, match="layer 4"):
        vit(golden["pixels"], layer=4)


@pytest.mark.parametrize("name", [name for name in ENCODERS if not name.startswith("sam")])
@torch.no_grad()
def test_other_sizes_equal_reference(name, fixtures):
    """Fewer and more patches than the positions were made for, and sizes that aren't a multiple of the patch."""
    for size, last in load_file(fixtures / name / "resized.safetensors").items():
        vit = ViT.from_pretrained(str(fixtures / name), image_size=int(size))
        close(vit(vit.preprocess(picture(53, 37))[None]), last)


def test_image_size(fixtures):
    assert ViT.from_pretrained(str(fixtures / "dinov2")).config.grid == 5  # 30 px, as its preprocessing makes; not 42
    assert ViT.from_pretrained(str(fixtures / "sam"), image_size=30).config.image_size == 30
    with pytest.raises(InputError, match="image_size 36: the encoder takes 30 px alone"):
        ViT.from_pretrained(str(fixtures / "sam"), image_size=36)
    with pytest.raises(InputError, match="image_size 5: the encoder takes 6 px, one patch, or more"):
        ViT.from_pretrained(str(fixtures / "vit"), image_size=5)


@pytest.mark.parametrize("name", ENCODERS)
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


@torch.no_grad()
def test_real_checkpoint_equals_reference(shared, fixtures):
    golden = load_file(fixtures / "real.safetensors")
    vit = ViT.from_pretrained(str(shared / "checkpoints" / "vit-tiny"))
    pixels = vit.preprocess(picture(300, 200))[None]
    close(vit(pixels)[:, ::20], golden["vit-tiny.last"])
    close(vit(pixels, layer=-2)[:, ::20], golden["vit-tiny.layer-2"])
