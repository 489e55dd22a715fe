/* Text from the demo ensemble, or from directories: generate PROMPT [LARGE SMALL EXPERT...]
 *
 * cargo build --release -p dlf-engine-c
 * cc -std=c11 -I src/bindings/c/include examples/c/generate.c -L target/release -ldlf_engine -Wl,-rpath,$PWD/target/release -o generate */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dlf_engine.h"

static bool show(const dlf_token *token, void *user_data) {
    FILE *file = user_data;
    fwrite(token->text, 1, token->text_len, file);
    fflush(file);
    return true; /* false would end the generation */
}

static dlf_status generate(const dlf_engine *engine, const char *text) {
    size_t len = 0;
    /* Asked without a buffer, it says how many there are. */
    dlf_status status = dlf_tokenize(engine, text, strlen(text), true, NULL, 0, &len);
    if (status != DLF_BUFFER_TOO_SMALL) {
        return status;
    }
    uint32_t *ids = calloc(len, sizeof *ids);
    if (ids == NULL) {
        return DLF_INTERNAL;
    }
    status = dlf_tokenize(engine, text, strlen(text), true, ids, len, &len);
    if (status == DLF_OK) {
        const dlf_tokens prompt = {ids, len};
        dlf_request request = dlf_request_default();
        request.prompts = &prompt;
        request.num_prompts = 1;
        request.max_new_tokens = 32;
        status = dlf_generate(engine, &request, 1, show, stdout);
        putchar('\n');
    }
    free(ids);
    return status;
}

int main(int argc, char **argv) {
    if (argc < 2 || argc == 3 || argc == 4) {
        fprintf(stderr, "usage: generate PROMPT [LARGE SMALL EXPERT...]\n");
        return 2;
    }
    dlf_engine *engine = NULL;
    dlf_status status;
    if (argc == 2) {
        status = dlf_open_demo(NULL, &engine);
    } else {
        const dlf_models models = {argv[2], argv[3], (const char *const *)&argv[4], (size_t)argc - 4};
        status = dlf_open(&models, NULL, &engine);
    }
    if (status == DLF_OK) {
        status = generate(engine, argv[1]);
    }
    if (status != DLF_OK) {
        fprintf(stderr, "error: %s\n", dlf_last_error());
    }
    dlf_close(engine);
    return status == DLF_OK ? 0 : 1;
}
