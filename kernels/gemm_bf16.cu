#include "gemm_projections.cuh"

WIDE_PROJECTIONS(bf16, bf16)
