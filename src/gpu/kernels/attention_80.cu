// Heads of 80 on tensor cores: a file for each width, so that a driver compiles what a model needs and no more.
#include "attention_mma.cuh"

ATTENTION_MMA(Bf16, bf16, 80, 2, 32, 32, 32)
ATTENTION_MMA(F16, f16, 80, 2, 32, 32, 32)
