# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect trace`: a page that shows what each decode step of one answer attended to."""
