// Heads of 128 on tensor cores: a file for each width, so that a driver compiles what a model needs and no more.
#include "attention_mma.cuh"

ATTENTION_MMA(Bf16, bf16, 128, 2, 32, 32, 32)
ATTENTION_MMA(F16, f16, 128, 2, 32, 32, 32)
