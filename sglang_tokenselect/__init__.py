# SPDX-License-Identifier: Apache-2.0
"""TokenSelect attention for SGLang."""

__version__ = "0.1.0"
