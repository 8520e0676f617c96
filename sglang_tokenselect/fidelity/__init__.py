# SPDX-License-Identifier: Apache-2.0
"""How much of dense attention a selection keeps: the measures, and the command that takes them of a model."""
