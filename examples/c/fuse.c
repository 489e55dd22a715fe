/* Fusion of logits that another engine computed. No model is loaded.
 *
 * cargo build --release -p dlf-engine-c
 * cc -std=c11 -I src/bindings/c/include examples/c/fuse.c -L target/release -ldlf_engine -Wl,-rpath,$PWD/target/release -o fuse */
#include <stdio.h>

#include "dlf_engine.h"

enum { ROWS = 2, VOCAB_SIZE = 3 };

int main(void) {
    /* The expert has learnt to prefer token 2 in row 0, and nothing new in row 1. */
    const float large[ROWS * VOCAB_SIZE] = {1.0f, 2.0f, 0.5f, 1.0f, 2.0f, 0.5f};
    const float small[ROWS * VOCAB_SIZE] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};
    const float expert[ROWS * VOCAB_SIZE] = {1.0f, 1.0f, 4.0f, 1.0f, 1.0f, 1.0f};
    const float *const experts[] = {expert};
    const dlf_logits logits = {
        .large = large,
        .small = small,
        .experts = experts,
        .num_experts = 1,
        .rows = ROWS,
        .vocab_size = VOCAB_SIZE,
    };

    dlf_fuser *fuser = NULL;
    dlf_decision decisions[ROWS];
    if (dlf_fuser_new(1, &fuser) != DLF_OK ||
        dlf_fuse(fuser, &logits, NULL, NULL, NULL, ROWS, decisions) != DLF_OK) {
        fprintf(stderr, "error: %s\n", dlf_last_error());
        dlf_fuser_free(fuser);
        return 1;
    }
    for (size_t row = 0; row < ROWS; row++) {
        printf("row %zu: large %u, fused %u, alpha %.1f\n", row, (unsigned)decisions[row].argmax_large,
               (unsigned)decisions[row].token, decisions[row].alpha[0]);
    }
    dlf_fuser_free(fuser);
    return 0;
}
