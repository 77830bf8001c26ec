"""Run by test_recipes.py as a process of its own: the original repository's model.py, recorded by the recipe of
docs/verifying.md. Arguments: its inference folder, the recipe's file, rank 0's weights, its config, tokens as JSON, the
trace's folder."""

import json
import runpy
import sys

import torch
from safetensors.torch import load_model


def main() -> None:
    folder, recipe, weights, config, tokens, target = sys.argv[1:]
    sys.path.insert(0, folder)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_num_threads(1)
    import model as original

    fields = json.loads(config)
    args = original.ModelArgs(**fields)
    network = original.Transformer(args)
    load_model(network, weights)
    with torch.inference_mode():
        runpy.run_path(recipe)["record"](network, json.loads(tokens), target)


main()
