#include "projections.cuh"

PROJECTIONS(bf16, bf16)
