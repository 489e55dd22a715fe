#include "projections.cuh"

PROJECTIONS(f16, f16)
