#include "gemm_projections.cuh"

WIDE_PROJECTIONS(f16, f16)
