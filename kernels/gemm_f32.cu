#include "gemm_projections.cuh"

WIDE_PROJECTIONS(float, f32)
