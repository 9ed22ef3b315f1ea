"""Several ranks answer as one does: batches, windows, biases, shared KV heads, 8 and 4 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpn_rt import LLM, SamplingParams
from dpn_rt.format.config import ModelConfig
from dpn_rt.outputs import RequestOutput
from tests.engine.models import MODEL, VOCAB_SIZE, random_prompt, with_decoder, write_random_engine
from tests.seeds import fresh_seed

pytestmark = pytest.mark.usefixtures("ranks_in_threads")
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, logprobs=-1, ignore_eos=True)
TOLERANCE = 1e-4
