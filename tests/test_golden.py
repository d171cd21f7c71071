"""The golden data is whole: every file that a test names is there, and every file there is named."""

import golden_data
import pytest

NAMES = (*golden_data.LORAMOE, *golden_data.LOKI, *golden_data.ATTRIBUTION)


@pytest.mark.smoke
def test_the_folder_holds_the_named_files_alone():
    assert {path.name for path in golden_data.FOLDER.iterdir()} == {"README.md", *(f"{n}.safetensors" for n in NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_file_can_be_read(name):
    settings, tensors = golden_data.load(name)
    assert settings and tensors and all(tensor.numel() for tensor in tensors.values())
