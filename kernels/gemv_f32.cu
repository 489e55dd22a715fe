#include "projections.cuh"

PROJECTIONS(float, f32)
