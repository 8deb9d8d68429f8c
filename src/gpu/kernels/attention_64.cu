// Heads of 64 on tensor cores: a file for each width, so that a driver compiles what a model needs and no more.
#include "attention_mma.cuh"

ATTENTION_MMA(Bf16, bf16, 64, 2, 64, 64, 64)
ATTENTION_MMA(F16, f16, 64, 2, 64, 64, 64)
