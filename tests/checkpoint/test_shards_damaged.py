"""Files of weights that are damaged, cut short, or no safetensors at all: refused in one line that names the file."""

import random
import struct

import pytest
from checkpoint_helpers import assert_same_tensors, load, refusal, shard, tensors_of
from safetensors.torch import load_file


def test_a_folder_in_the_place_of_the_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refusal(folder, "model.safetensors")


def test_a_broken_link(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/gone")
    refusal(folder, "model.safetensors")


def test_a_file_cut_at_any_place(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = random.Random(0)
    places = {*range(12), header - 1, header, header + 1, len(whole) - 1, len(whole) - 4, *range(0, header, 97)}
    for place in sorted(places | {rng.randrange(len(whole)) for _ in range(30)}):
        path.write_bytes(whole[:place])
        refusal(folder, str(path), "damaged")


def test_a_cut_shard_is_named(folder):
    path = folder / sorted(set(shard(folder).values()))[1]
    path.write_bytes(path.read_bytes()[:-1])
    refusal(folder, str(path), "damaged")


def test_a_file_with_bytes_behind_its_end(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    refusal(folder, str(path), "damaged")


def test_a_flipped_bit_in_the_header_never_loads_other_weights(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    source = load_file(path)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    places = [*range(64), *random.Random(1).sample(range(64, 8 * header), 300)]
    harmless = 0
    for place in places:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            loaded, message = load(folder), None
        except ValueError as error:
            loaded, message = None, str(error)
        if loaded is None:
            assert "\n" not in message, place
            assert str(folder) in message, place
        else:  # a bit of the spaces that pad the header, or of its metadata
            assert_same_tensors(tensors_of(loaded), source)
            harmless += 1
    assert harmless < 40


def test_a_file_of_noise(folder):
    path = folder / "model.safetensors"
    rng = random.Random(2)
    for size in (1, 8, 9, 100, 5000):
        path.write_bytes(rng.randbytes(size))
        refusal(folder, str(path), "damaged")


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.3])
def test_a_download_cut_short_is_named_with_its_sizes(folder, kept):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    refusal(folder, "cut short, as by an interrupted download", f"{int(kept * len(whole)):,} of {len(whole):,} bytes")


@pytest.mark.parametrize(
    ("kept", "said"),
    [(0, "it is empty"), *((n, f"it ends after {n:,} bytes, in the middle of its header") for n in (1, 7, 8, 9, 1000))],
)
def test_a_download_cut_short_within_the_header_is_named(folder, kept, said):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refusal(folder, f"{path}: damaged or cut short, as by an interrupted download ({said}); fetch it again")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Access to model x/y is restricted.", r"it begins b'Access to model ')"),
        (b"GGUF\x03\0\0\0\x22\x01\0\0\0\0\0\0", r"it begins b'GGUF\x03\x00"),
        (struct.pack("<Q", 5 * 2**20) + b"{" + b" " * 5 * 2**20, "a header of 5,242,880 bytes"),
    ],
)
def test_a_file_of_another_kind_is_named_by_how_it_begins(folder, content, said):
    (folder / "model.safetensors").write_bytes(content)
    refusal(folder, f"model.safetensors: damaged or not a safetensors file ({said}")


def test_a_header_that_has_a_name_twice_is_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    header = whole[8:end].replace(b"model.layers.0.mlp.up_proj.weight", b"model.layers.1.mlp.up_proj.weight")
    path.write_bytes(whole[:8] + header + whole[end:])
    refusal(folder, f"{path}: damaged: its header lists model.layers.1.mlp.up_proj.weight twice; fetch it again")
