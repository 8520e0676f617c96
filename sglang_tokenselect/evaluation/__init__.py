# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect eval`: answer accuracy of any OpenAI-compatible server on synthetic long texts."""
