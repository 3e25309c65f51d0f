"""The data files: the originals load, anything else is refused before an array is made; importing is silent."""

import gzip
import hashlib
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import pruning_utils
from pruning_utils import CLASS_NAMES, DATA, DIGESTS, load_dataset

LABELS = "mnist/t10k-labels-idx1-ubyte"
IMAGES = "mnist/t10k-images-idx3-ubyte"


@pytest.fixture(scope="module", params=["mnist", "fashion-mnist"])
def dataset(request):
    return load_dataset(request.param)


def test_images_are_float32_rows_between_0_and_1(dataset):
    for images, count in ((dataset.x_train, 60_000), (dataset.x_test, 10_000)):
        assert (images.shape, images.dtype) == ((count, 784), np.float32)
        assert images.min() == 0 and images.max() == 1


def test_labels_are_int32_and_every_class_occurs(dataset):
    for labels, count in ((dataset.y_train, 60_000), (dataset.y_test, 10_000)):
        assert (labels.shape, labels.dtype) == ((count,), np.int32)
        assert set(labels) == set(range(10))
    assert dataset.class_names == CLASS_NAMES[dataset.name] and len(dataset.class_names) == 10


def test_the_facts_the_study_rests_on(dataset):
    dead = int(np.sum(~dataset.x_train.any(axis=0)))
    per_class = np.bincount(dataset.y_test).tolist()
    if dataset.name == "mnist":
        assert dead == 67 and per_class[0] == 980
    else:
        assert dead == 0 and per_class == [1000] * 10


def test_pixels_and_labels_are_those_in_the_files(dataset):
    folder = DATA / dataset.name
    pixels = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())[16:], np.uint8)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:], np.uint8)
    np.testing.assert_array_equal(dataset.x_test.ravel(), pixels.astype(np.float32) / 255)
    np.testing.assert_array_equal(dataset.y_test, labels)


def test_unknown_dataset_lists_the_valid_names():
    with pytest.raises(ValueError, match=r"'cifar'.*mnist.*fashion-mnist"):
        load_dataset("cifar")


# --- Damaged files ------------------------------------------------------------------------------------------------


@pytest.fixture
def labels_file(tmp_path):
    copy = tmp_path / f"{LABELS}.gz"
    copy.parent.mkdir()
    return Path(shutil.copy(DATA / f"{LABELS}.gz", copy))


def assert_refused(path, member=LABELS, shape=(10_000,), found=""):
    """The error names the file, the expected hash, what was found, and how to restore the file."""
    with pytest.raises(ValueError) as caught:
        pruning_utils._read_idx(path, DIGESTS[member], shape)
    for part in (str(path), DIGESTS[member], found, f"git checkout -- data/mnist/{path.name}"):
        assert part in str(caught.value)


def digest(content):
    return hashlib.sha256(content).hexdigest()


def test_the_undamaged_copy_loads(labels_file):
    labels = pruning_utils._read_idx(labels_file, DIGESTS[LABELS], (10_000,))
    assert labels.shape == (10_000,) and labels.dtype == np.uint8


def test_a_missing_file_is_named(labels_file):
    labels_file.unlink()
    assert_refused(labels_file, found="no file")


def test_an_empty_file_is_refused(labels_file):
    labels_file.write_bytes(b"")
    assert_refused(labels_file, found=digest(b""))


@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(labels_file, part):
    content = labels_file.read_bytes()
    labels_file.write_bytes(content[: int(part * len(content))])
    assert_refused(labels_file, found="SHA-256")


@pytest.mark.parametrize("position", [0, 2, 100, 2000, -6, -1])  # magic, method, stream, stream, checksum, length
def test_a_flipped_byte_in_the_compressed_file_is_refused(labels_file, position):
    content = bytearray(labels_file.read_bytes())
    content[position] ^= 0xFF
    labels_file.write_bytes(content)
    assert_refused(labels_file, found="SHA-256")


@pytest.mark.parametrize("position", [0, 5, 8, 5000, -1])  # IDX magic, IDX count, first, middle and last label
def test_a_flipped_byte_in_the_content_is_refused(labels_file, position):
    content = bytearray(gzip.decompress(labels_file.read_bytes()))
    content[position] ^= 1
    labels_file.write_bytes(gzip.compress(content))
    assert_refused(labels_file, found=digest(content))


def test_another_dataset_under_this_name_is_refused(labels_file):
    shutil.copy(DATA / "fashion-mnist" / labels_file.name, labels_file)
    assert_refused(labels_file, found=DIGESTS["fashion-mnist/t10k-labels-idx1-ubyte"])


def test_a_header_that_claims_billions_of_images_is_refused_without_allocating_them(tmp_path):
    path = tmp_path / f"{IMAGES}.gz"
    path.parent.mkdir()
    content = struct.pack(">HBB3I", 0, 8, 3, 2**31, 28, 28) + bytes(64 << 20)
    path.write_bytes(gzip.compress(content, 1))
    tracemalloc.start()
    assert_refused(path, IMAGES, (10_000, 28, 28), found=digest(content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_load_dataset_reads_the_folder_it_is_given(tmp_path, damage):
    shutil.copytree(
        DATA / "mnist", tmp_path / "mnist", copy_function=lambda source, copy: Path(copy).symlink_to(source)
    )
    broken = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    broken.unlink()
    if damage == "truncated":
        broken.write_bytes((DATA / "mnist" / broken.name).read_bytes()[:100_000])
    with pytest.raises(ValueError) as caught:
        load_dataset("mnist", tmp_path)
    assert str(broken) in str(caught.value) and f"git checkout -- data/mnist/{broken.name}" in str(caught.value)


# --- Import -------------------------------------------------------------------------------------------------------


def test_importing_is_silent_and_needs_no_network():
    script = """
import socket
class Blocked(socket.socket):
    def __init__(self, *args, **kwargs):
        raise OSError("no network here")
socket.socket = Blocked
socket.getaddrinfo = socket.create_connection = None
import pruning_utils
"""
    folder = Path(pruning_utils.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
