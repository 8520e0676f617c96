# SPDX-License-Identifier: Apache-2.0
"""What each decode query attended to: files that a server writes (`--tokenselect-record`) and commands read."""
