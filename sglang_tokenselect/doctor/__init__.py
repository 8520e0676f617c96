# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect doctor`: what a bug report needs, and whether a server would start."""
