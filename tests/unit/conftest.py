# SPDX-License-Identifier: Apache-2.0
"""What several files of tests without a server share."""

from __future__ import annotations

import shutil

import pytest

from sglang_tokenselect.needle import checkpoint_path


@pytest.fixture
def tokenizer(tmp_path):
    """A folder that has nothing but the checkpoint's tokenizer."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(checkpoint_path() / "tokenizer.json", folder)
    return str(folder)
