"""Command lines that cannot work, and what is to be said of each; `python -m tests.bad_commands` runs them.

The program reads [command, arguments] from stdin, one a line in JSON, and answers each with [exit code, what was said].
A child process runs the command as its module does; the libraries are imported once.
"""

import gc
import importlib
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import traceback

REPOSITORY = pathlib.Path(__file__).parents[1]
MODULES = {  # where each begins
  "train": ("jaxpref.main", "run"),
  "sample": ("jaxpref.sample", "main"),
  "evaluate": ("jaxpref.evaluate", "main"),
  "export": ("jaxpref.export", "main"),
  "score": ("jaxpref.score", "run"),
  "pairs": ("jaxpref.pairs", "main"),
  "vote": ("jaxpref.vote", "main"),
  "blind": ("jaxpref.blind", "main"),
  "precompute": ("jaxpref.precompute", "start"),
  "describe": ("jaxpref.describe", "main"),
  "compile": ("jaxpref.compile", "run"),
  "replay": ("jaxpref.replay", "main"),
  "pickapic": ("jaxpref.data.pickapic.__main__", "main"),
}

DPO, SPO = (f"--config=recipes/{name}_tiny.py" for name in ("dpo", "spo"))
MINI = [DPO, "--config.model=random:sd15-miniature"]
DRAW = ["--prompts=prompts.txt", "--out=o"]
BASE = ["--models", "base=tiny-sd", "--prompts=emoji", "--scorers", "judge"]

# Command, arguments, and what is in the sentence; HOME stands for the home folder. `prepare` makes what is named here.
TABLE = [
  ("train", [], "--config is missing"),
  ("train", ["--config=nowhere.py"], "--config=nowhere.py: there is no file nowhere.py"),
  ("train", [DPO, "--workdir=/proc/x/y"], "/proc/x/y cannot be written"),
  ("train", [DPO, "--workdir=file"], "work folder file is a file"),
  ("train", [DPO, "--workdir=file/x"], "file/x cannot be written"),
  ("train", [DPO, "--workdir=~no-such-user/x"], "there is no user 'no-such-user'"),
  ("train", [DPO, "--workdir=~/file"], "work folder HOME/file is a file"),
  ("train", [DPO, "--workdir=full"], "work folder full is not empty and holds no config.json of an"),
  ("train", [DPO, "--workdir=gs://x/y"], "--workdir=gs://x/y:"),
  ("train", [DPO, "--config.seed=-1"], "config.seed=-1"),
  ("train", [DPO, "--config.seed=4294967301"], "config.seed=4294967301"),
  ("train", [DPO, "--config.seed=99999999999999999999999"], "config.seed=99999999999999999999999"),
  ("train", [DPO, "--config.model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("train", [DPO, "--config.model=~no-such-user/nothing"], "there is no user 'no-such-user'"),
  ("train", [DPO, "--config.model=file"], "file is a file"),
  ("train", [DPO, "--config.model="], "model_index.json is missing"),
  ("train", [DPO, "--config.model=~/x.safetensors"], "there is no file HOME/x.safetensors"),
  ("train", [DPO, "--config.model=broken.safetensors"], "broken.safetensors is not a readable safetensors file"),
  ("train", [DPO, "--config.model=flux.safetensors"], "flux.safetensors is Flux, expected a whole checkpoint"),
  ("train", [DPO, "--config.model=model.ckpt"], "model.ckpt is a pickle, which can run code and is never loaded"),
  ("train", [DPO, "--config.model_config=empty"], "config.model_config (--model_config) is for a checkpoint in one"),
  ("train", [DPO, "--config.unet_model=flux.safetensors"], "flux.safetensors is Flux, expected a UNet in the layout"),
  ("train", [DPO, "--config.vae_model=flux.safetensors"], "flux.safetensors is Flux, expected a VAE in the layout"),
  ("train", [DPO, "--config.vae_model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("train", [SPO, "--config.preference_model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("train", [SPO, "--config.reward=pickscore=~/nothing:1"], "has no weights: model folder HOME/nothing does not exist"),
  ("train", [DPO, "--config.lora.init_from=~/nothing"], "there is no LoRA file HOME/nothing"),
  (
    "train",
    [DPO, "--config.lora.init_from=broken.safetensors"],
    "broken.safetensors is not a readable safetensors file",
  ),
  (
    "train",
    [DPO, "--config.data.source=pairs_file", "--config.data.path=~/nothing.jsonl"],
    "there is no file HOME/nothing.jsonl",
  ),
  ("train", [DPO, "--config.unet_model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("train", [DPO, "--config.judge=~/nothing"], "model folder HOME/nothing does not exist"),
  (
    "train",
    [DPO, "--config.data.source=rankings", "--config.data.path=rankings.json", "--config.data.images=~/nothing"],
    "rankings.json, entry 0: 'a.png' does not exist in HOME/nothing",
  ),
  (
    "train",
    [DPO, "--config.data.source=precomputed", "--config.data.path=~/nothing"],
    "HOME/nothing has no precomputed data",
  ),
  (
    "train",
    [SPO, "--config.data.source=prompts", "--config.data.path=~/nothing.txt"],
    "there is no file of prompts HOME/nothing.txt",
  ),
  ("train", [SPO, "--config.data.source=prompts", "--config.data.path=broken.json"], "broken.json is not JSON"),
  ("train", [DPO, "--config.logging.wandb_project=p"], "config.logging.wandb_project='p', but wandb"),
  ("train", [DPO, "--config.data.source=tfds", "--config.data.path=empty"], "empty holds no dataset_info.json"),
  (
    "train",
    [DPO, "--config.data.scores=~/nothing.npz", "--config.data.labels=scores"],
    "training in runs/dpo_tiny: HOME/nothing.npz: no such file or",
  ),
  (
    "train",
    [DPO, "--config.evaluation.scorers=judge", "--config.evaluation.prompts=~/nothing.txt"],
    "there is no file of prompts HOME/nothing.txt",
  ),
  ("train", [DPO, "--config.evaluation.scorers=pickscore=~no-such-user/x"], "there is no user 'no-such-user'"),
  ("train", [DPO, "--config.num_steps=1099511627776"], "config.num_steps=1099511627776"),
  ("train", [DPO, "--config.batch_size=0"], "config.batch_size=0"),
  ("train", [DPO, "--config.batch_size=99999999999"], "config.batch_size=99999999999"),
  ("train", [DPO, "--config.mesh.data=0"], "mesh: sizes must be positive and at most one -1"),
  ("train", [DPO, "--config.mesh.data=5"], "mesh: data=5 x fsdp=1 x tensor=1 does not cover 1 devices"),
  ("train", [DPO, "--config.mesh.fsdp=-1"], "mesh: sizes must be positive and at most one -1"),
  ("train", [DPO, "--num_processes=0", "--process_id=0", "--coordinator_address=localhost:1"], "--num_processes=0"),
  ("train", [DPO, "--process_id=-1", "--num_processes=2", "--coordinator_address=localhost:1"], "--process_id=-1"),
  ("train", [DPO, "--coordinator_address=localhost"], "--coordinator_address=localhost without --num_processes and"),
  ("train", [DPO, "--distributed=maybe"], "--distributed=maybe"),
  ("train", [DPO, "--config.profile_steps=5"], "config.profile_steps='5'"),
  ("train", [DPO, "--config.data.num_threads=-1"], "config.data.num_threads=-1"),
  ("train", [DPO, "--config.loss.beta=nan"], "config.loss.beta=nan"),
  ("train", [DPO, "--config.loss.beta=x"], "flag --config.loss.beta=x: could not convert string to float"),
  ("train", [DPO, "--config.data.flip=perhaps"], "flag --config.data.flip=perhaps:"),
  ("train", [DPO, "--config.image_size=64x32"], "config.image_size='64x32'; expected an integer or a tuple."),
  ("train", [DPO, "--config.image_size=32,64,32"], "config.image_size=(32, 64, 32); expected pixels of a side, or of"),
  (
    "train",
    [DPO, "--config.image_size=32,99999999"],
    "config.image_size=(32, 99999999); expected pixels of a side, or",
  ),
  (
    "train",
    [DPO, "--config.image_size=32,7"],
    "config.image_size=(32, 7): images of 32 x 7 pixels, expected multiples",
  ),
  ("train", [SPO, "--config.image_size=7"], "config.image_size=7: images of 7 x 7 pixels, expected multiples of 4"),
  ("train", ["--config=recipes/dpo_tiny.py:smoke"], "--config=recipes/dpo_tiny.py:smoke: recipes/dpo_tiny.py has"),
  ("train", ["--config=broken.json"], "broken.json"),
  ("train", ["--config=empty"], "--config=empty: there is no file empty"),
  ("sample", [], "one of the arguments --prompt --prompts is required"),
  ("sample", ["--prompt=cat", "--out=/proc/x/y"], "cannot be written"),
  ("sample", ["--prompt=cat", "--out=/proc/x/y.png"], "cannot be written"),
  ("sample", ["--prompt=cat", "--out=file"], "--out=file is a file"),
  ("sample", ["--prompt=cat", "--out=file/x"], "cannot be written"),
  ("sample", ["--prompt=cat", "--out=full"], "--out=full exists and is not empty"),
  ("sample", ["--prompt=cat", "--out=~no-such-user/x"], "there is no user 'no-such-user'"),
  ("sample", ["--prompt=cat", "--out=~/file"], "--out=HOME/file is a file"),
  ("sample", ["--prompt=cat", "--seed=-1"], "--seed=-1"),
  ("sample", ["--prompt=cat", "--seed=4294967301"], "--seed=4294967301"),
  ("sample", ["--prompt=cat", "--seed=99999999999999999999999"], "--seed=99999999999999999999999"),
  ("sample", ["--prompt=cat", "--seed=x"], "argument --seed: invalid int value: 'x'"),
  ("sample", ["--prompt=cat", "--seeds=0"], "--seeds=0"),
  ("sample", ["--prompt=cat", "--seeds=99999999999"], "--seeds=99999999999"),
  ("sample", ["--prompt=cat", "--steps=2000"], "--steps=2000"),
  ("sample", ["--prompt=cat", "--steps=0"], "--steps=0"),
  ("sample", ["--prompt=cat", "--batch_size=99999999"], "--batch_size=99999999"),
  ("sample", ["--prompt=cat", "--height=99999999"], "--height=99999999"),
  ("sample", ["--prompt=cat", "--width=-8"], "--width=-8"),
  ("sample", ["--prompt=cat", "--height=7"], "--height=7: images of 7 x 32 pixels, expected multiples of 4"),
  ("sample", ["--prompt=cat", "--height=8", "--width=9"], "--height=8 --width=9: images of 8 x 9 pixels, expected"),
  ("sample", ["--prompt=cat", "--clip_skip=-1"], "--clip_skip=-1"),
  ("sample", ["--prompt=cat", "--model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("sample", ["--prompt=cat", "--model=~no-such-user/nothing"], "there is no user 'no-such-user'"),
  ("sample", ["--prompt=cat", "--model=file"], "file is a file"),
  ("sample", ["--prompt=cat", "--model=begun"], "begun/model_index.json is missing"),
  ("sample", ["--prompt=cat", "--model="], "model_index.json is missing"),
  ("sample", ["--prompt=cat", "--model=broken.safetensors"], "broken.safetensors is not a readable safetensors file"),
  ("sample", ["--prompt=cat", "--model=flux.safetensors"], "flux.safetensors is Flux, expected a whole checkpoint"),
  ("sample", ["--prompt=cat", "--model=model.ckpt"], "model.ckpt is a pickle, which can run code"),
  (
    "sample",
    ["--prompt=cat", "--model=sd1.safetensors"],
    "sd1.safetensors is Stable Diffusion 1, but the tokenizer of",
  ),
  ("sample", ["--prompt=cat", "--model=sd1.safetensors", "--model_config=empty"], "empty/model_index.json is missing"),
  ("sample", ["--prompt=cat", "--model_config=empty"], "config.model_config (--model_config) is for a checkpoint in"),
  ("sample", ["--prompt=cat", "--vae_model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("sample", ["--prompt=cat", "--lora=~/nothing.safetensors"], "--lora: there is no file HOME/nothing.safetensors"),
  ("sample", ["--prompt=cat", "--lora=~/nothing.safetensors:0.5"], "--lora: there is no file HOME/nothing.safetensors"),
  ("sample", ["--prompt=cat", "--lora=broken.safetensors"], "broken.safetensors is not a readable safetensors file"),
  ("sample", ["--prompt=cat", "--lora=prompts.txt"], "prompts.txt is not a .safetensors file"),
  ("sample", ["--prompt=cat", "--unet_model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("sample", ["--prompt=cat", "--lora=empty"], "--lora: there is no file empty"),
  ("sample", ["--prompts=~/nothing.txt"], "there is no file of prompts ~/nothing.txt"),
  ("sample", ["--prompts=empty.txt"], "empty.txt has no prompts"),
  ("sample", ["--prompts=broken.json"], "broken.json is not JSON"),
  ("sample", ["--prompts=binary.txt"], "binary.txt is not UTF-8 text"),
  ("sample", ["--prompt=cat", "--eta=nan"], "--eta=nan"),
  ("sample", ["--prompt=cat", "--family=nothing"], "--family='nothing'"),
  ("sample", ["--prompt=cat", "--dtype=float16"], "argument --dtype: invalid choice: 'float16'"),
  ("evaluate", [], "the following arguments are required: --models"),
  ("evaluate", [*BASE, "--out=/proc/x/y"], "/proc/x/y cannot be written"),
  ("evaluate", [*BASE, "--out=file"], "--out=file is a file"),
  ("evaluate", [*BASE, "--out=file/x"], "file/x cannot be written"),
  ("evaluate", [*BASE, "--out=full"], "--out=full is not empty and has no manifest.json"),
  ("evaluate", [*BASE, "--out=~no-such-user/x"], "there is no user 'no-such-user'"),
  ("evaluate", [*BASE, "--height=7"], "--height=7: images of 7 x 32 pixels, expected multiples of 4"),
  ("evaluate", [*BASE, "--width=2"], "--width=2: images of 32 x 2 pixels, expected multiples of 4"),
  ("evaluate", [*BASE, "--seed=-1"], "--seed=-1"),
  ("evaluate", [*BASE, "--seed=4294967301"], "--seed=4294967301"),
  ("evaluate", [*BASE, "--num_prompts=0"], "--num_prompts=0"),
  ("evaluate", [*BASE, "--num_prompts=99999999999"], "--num_prompts=99999999999"),
  ("evaluate", [*BASE, "--pictures=0"], "--pictures=0"),
  ("evaluate", [*BASE, "--score_batch_size=99999999999"], "--score_batch_size=99999999999"),
  (
    "evaluate",
    ["--models", "base=~/nothing", "--prompts=emoji", "--scorers", "judge"],
    "model folder HOME/nothing does not exist",
  ),
  (
    "evaluate",
    ["--models", "base=~no-such-user/x", "--prompts=emoji", "--scorers", "judge"],
    "there is no user 'no-such-user'",
  ),
  (
    "evaluate",
    ["--models", "base=tiny-sd+~/nothing.safetensors", "--prompts=emoji", "--scorers", "judge"],
    "--models 'base=tiny-sd+~/nothing.safetensors': there is no f",
  ),
  (
    "evaluate",
    ["--models", "base=tiny-sd+broken.safetensors", "--prompts=emoji", "--scorers", "judge"],
    "broken.safetensors is not a readable safetensors file",
  ),
  ("evaluate", [*BASE, "--unet_model=base=~/nothing"], "model folder HOME/nothing does not exist"),
  ("evaluate", ["--models", "tiny-sd", "--prompts=emoji", "--scorers", "judge"], "--models 'tiny-sd'"),
  (
    "evaluate",
    ["--models", "a=tiny-sd", "a=tiny-sd", "--prompts=emoji", "--scorers", "judge"],
    "--models names 'a' twice",
  ),
  (
    "evaluate",
    ["--models", "base=tiny-sd", "--prompts=~/nothing.txt", "--scorers", "judge"],
    "there is no file of prompts HOME/nothing.txt",
  ),
  (
    "evaluate",
    ["--models", "base=tiny-sd", "--prompts=emoji:trian", "--scorers", "judge"],
    "split of the emoji data must be one of train",
  ),
  (
    "evaluate",
    ["--models", "base=tiny-sd", "--prompts=emoji", "--scorers", "pickscore=~/nothing"],
    "scorer pickscore has no weights: model folder HOME/nothing d",
  ),
  (
    "evaluate",
    ["--models", "base=tiny-sd", "--prompts=emoji", "--scorers", "pickscore=~no-such-user/x"],
    "there is no user 'no-such-user'",
  ),
  (
    "evaluate",
    ["--models", "base=tiny-sd", "--prompts=emoji", "--scorers", "pikscore"],
    "scorer 'pikscore' is unknown",
  ),
  (
    "evaluate",
    ["--models", "base=tiny-sd", "--prompts=emoji", "--scorers", "nothing:score"],
    "scorer nothing:score: the module nothing cannot be imported",
  ),
  ("evaluate", [*BASE, "--diversity=judge"], "--diversity=judge"),
  ("evaluate", [*BASE, "--preferred_style=nato"], "knows the styles"),
  (
    "evaluate",
    ["--models", "base=tiny-sd", "--prompts=prompts.txt", "--scorers", "judge", "--geneval_layout=~/g"],
    "prompt 0",
  ),
  ("evaluate", [*BASE, "--vae_model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("evaluate", ["--models=base=flux.safetensors", *BASE[2:]], "flux.safetensors is Flux, expected a whole checkpoint"),
  ("evaluate", [*BASE, "--model_config=base=empty"], "config.model_config (--model_config) is for a checkpoint in one"),
  (
    "evaluate",
    [*BASE, "--model_config=empty"],
    "--model_config 'empty'; expected NAME=FOLDER with the name of a model",
  ),
  ("evaluate", [*BASE, "--num_processes=0", "--process_id=0", "--coordinator_address=a:1"], "--num_processes=0"),
  ("export", [], "the following arguments are required: RUN"),
  (
    "export",
    ["~/nothing", "--format=lora", "--out=o.safetensors"],
    "HOME/nothing is not the work folder of a run: it has no config.js",
  ),
  ("export", ["begun", "--format=lora", "--out=o.safetensors"], "begun/checkpoints holds no checkpoint yet"),
  ("export", ["full", "--format=pipeline", "--out=o"], "full is not the work folder of a run: it has no config.json"),
  ("export", ["file", "--format=pipeline", "--out=o"], "file is not the work folder of a run: it has no config.json"),
  ("export", ["~no-such-user/x", "--format=pipeline", "--out=o"], "there is no user 'no-such-user'"),
  ("export", ["begun", "--format=tar", "--out=o"], "argument --format: invalid choice: 'tar'"),
  ("export", ["begun", "--format=pipeline", "--out=~no-such-user/x"], "there is no user 'no-such-user'"),
  ("export", ["begun", "--format=kohya", "--out=full"], "--out=full"),
  ("export", ["begun", "--format=pipeline", "--out=full"], "--out=full exists and is not empty"),
  ("export", ["begun", "--format=pipeline", "--out=/proc/x/y"], "--out=/proc/x/y cannot be written"),
  ("export", ["begun", "--format=pipeline", "--out=o", "--step=-1"], "--step=-1"),
  ("export", ["begun", "--format=pipeline", "--out=o", "--step=x"], "argument --step: invalid int value: 'x'"),
  ("export", ["begun", "--format=pipeline", "--out=o", "--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
  ("score", [], "--out is missing"),
  ("score", [DPO], "--out is missing"),
  ("score", ["--config=nowhere.py", "--out=o.npz"], "--config=nowhere.py: there is no file nowhere.py"),
  ("score", [DPO, "--out=o.txt"], "--out=o.txt"),
  ("score", [DPO, "--out=/proc/x/o.npz", "--model=tiny-spm"], "/proc/x cannot be written"),
  ("score", [DPO, "--out=file/o.npz", "--model=tiny-spm"], "file cannot be written"),
  ("score", [DPO, "--out=~no-such-user/o.npz", "--model=tiny-spm"], "there is no user 'no-such-user'"),
  ("score", [DPO, "--out=~/o.txt", "--model=tiny-spm"], "--out=HOME/o.txt"),
  ("score", [DPO, "--out=o.npz", "--model=~/nothing"], "model folder HOME/nothing does not exist"),
  (
    "score",
    [DPO, "--out=o.npz", "--model=tiny-spm", "--config.data.source=pairs_file", "--config.data.path=~/nothing.csv"],
    "there is no file HOME/nothing.csv",
  ),
  ("score", [DPO, "--out=o.npz", "--batch_size=0"], "--batch_size="),
  ("score", [DPO, "--out=o.npz", "--batch_size=99999999999"], "--batch_size="),
  ("score", [DPO, "--out=o.npz", "--config.seed=4294967301"], "config.seed=4294967301"),
  ("pairs", [], "the following arguments are required: --out"),
  ("pairs", ["--out=o"], "--prompts is missing; name what to draw, or give --label"),
  ("pairs", ["--out=empty", "--label=judge"], "--out=empty has no pictures.jsonl"),
  ("pairs", ["--out=empty", "--label=judge", "--steps=3"], "--steps is for drawing, which needs --prompts"),
  ("pairs", ["--out=empty", "--label=judge", "--karras"], "--karras is for drawing, which needs --prompts"),
  ("pairs", [*DRAW, "--out=/proc/x/y"], "/proc/x/y cannot be written"),
  ("pairs", [*DRAW, "--out=file"], "--out=file is a file"),
  ("pairs", [*DRAW, "--out=file/x"], "file/x cannot be written"),
  ("pairs", [*DRAW, "--out=full"], "--out=full is not empty and has no settings.json"),
  ("pairs", [*DRAW, "--out=~no-such-user/x"], "there is no user 'no-such-user'"),
  ("pairs", [*DRAW, "--seed=-1"], "--seed=-1"),
  ("pairs", [*DRAW, "--seeds=1"], "--seeds=1; expected at least 2, or --other_model"),
  ("pairs", [*DRAW, "--seeds=999999"], "--seeds=999999: 2 prompts make more than 2147483647 pairs"),
  ("pairs", [*DRAW, "--noise=same"], "--noise=same without --other_model"),
  ("pairs", [*DRAW, "--model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("pairs", [*DRAW, "--other_model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("pairs", [*DRAW, "--other_lora=a.safetensors"], "--other_lora is for --other_model"),
  ("pairs", [*DRAW, "--lora=~/nothing.safetensors"], "--lora: there is no file HOME/nothing.safetensors"),
  ("pairs", ["--prompts=~/nothing.txt", "--out=o"], "there is no file of prompts HOME/nothing.txt"),
  ("pairs", ["--prompts=empty.txt", "--out=o"], "empty.txt has no prompts"),
  ("pairs", [*DRAW, "--num_prompts=3"], "--num_prompts=3"),
  ("pairs", [*DRAW, "--min_gap=0.1"], "--min_gap is for labels by a reward; add --label=REWARD"),
  ("pairs", [*DRAW, "--label=judge", "--min_gap=1"], "--min_gap=1.0; expected at least 0 and below 1"),
  ("pairs", [*DRAW, "--label=judge", "--min_gap=nan"], "--min_gap=nan; expected at least 0 and below 1"),
  ("pairs", [*DRAW, "--label=judge", "--label_kind=firm"], "argument --label_kind: invalid choice: 'firm'"),
  ("pairs", [*DRAW, "--label=judge", "--score_batch_size=0"], "--score_batch_size=0"),
  ("pairs", [*DRAW, "--label=pikscore"], "--label='pikscore': pikscore is unknown, expected preference_model=FOLDER"),
  ("pairs", [*DRAW, "--label=judge:0"], "--label='judge:0': 'judge:0'; expected NAME:WEIGHT"),
  ("pairs", [*DRAW, "--label=preference_model"], "preference_model needs its model"),
  ("pairs", [*DRAW, "--label=preference_model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("pairs", [*DRAW, "--label=judge,judge=x"], "judge occurs twice"),
  ("pairs", [*DRAW, "--label=nothing:score"], "scorer nothing:score: the module nothing cannot be imported"),
  ("pairs", [*DRAW, "--process_id=-1", "--num_processes=2", "--coordinator_address=a:1"], "--process_id=-1"),
  ("pairs", ["--prompts=prompts.txt", "--out=gs://x/y"], "--out: gs://x/y is no path on this machine's disks"),
  ("pairs", ["--prompts=", "--out=o"], "the name of the file of prompts is empty"),
  ("pairs", ["--prompts=half.json", "--out=o"], "entry 1: prompt = 'a \\ud83d' has half of a character"),
  ("pairs", [*DRAW, "--label=preference_model=tiny-judge"], "model_type 'judge' is not supported"),
  ("pairs", ["--out=empty", "--label=judge", "--round=next"], "--round=next is for drawing, which needs --prompts"),
  ("pairs", ["--out=nothing", "--label=judge"], "--out=nothing does not exist; name a folder of pairs"),
  ("pairs", [*DRAW, "--round=first"], "--round=first; expected next, or a number from 0 to 9999"),
  ("pairs", [*DRAW, "--round=1"], "--round=1: o has 0 rounds; the next one is 0"),
  ("pairs", [*DRAW, "--round=next", "--model=full"], "full holds no finished run, which has export/"),
  ("vote", [], "expected one of PAIRS, --demo and --models, found none of them"),
  ("vote", ["~/nothing"], "there is no file or folder HOME/nothing"),
  ("vote", ["~no-such-user/x"], "there is no user 'no-such-user'"),
  ("vote", ["empty"], "empty has no pairs.jsonl and no dataset, so there are no pictures to vote on"),
  ("vote", ["prompts.txt"], "prompts.txt is of kind prompts; expected pairs"),
  ("vote", ["empty", "--port=99999"], "--port=99999; expected 1 to 65535"),
  (
    "vote",
    ["--models", "a=tiny-sd", "b=~/nothing", "--prompts=emoji", "--out=o"],
    "folder HOME/nothing does not exist",
  ),
  ("vote", ["--models", "a=tiny-sd", "b=tiny-sd", "--prompts=emoji", "--out=file"], "--out=file is a file"),
  ("vote", ["--models", "a=tiny-sd", "b=tiny-sd", "--prompts=emoji", "--out=/proc/x/y"], "/proc/x/y cannot be written"),
  ("vote", ["empty", "--overlap=2"], "--overlap=2.0; expected 0 to 1"),
  ("blind", [], "expected FOLDER or --models, and not both"),
  ("blind", ["empty"], "empty has no blind.json and no results.json of jaxpref.evaluate"),
  ("blind", ["empty", "--results"], "empty has no votes.sqlite"),
  ("blind", ["--models", "a=tiny-sd", "b=tiny-sd", "--prompts=empty.txt", "--out=o"], "empty.txt has no prompts"),
  ("blind", ["empty", "--votes=0"], "--votes=0; expected at least 1"),
  ("blind", ["empty", "--overlap=-1"], "--overlap=-1.0; expected 0 to 1"),
  ("blind", ["empty", "--port=0"], "--port=0; expected 1 to 65535"),
  ("blind", ["empty", "--out=o"], "--out=o is for --models"),
  ("blind", ["empty", "--prompts=emoji"], "--prompts is for --models"),
  ("blind", ["--models", "a=tiny-sd", "--prompts=emoji", "--out=o"], "--models names one model"),
  ("precompute", [], "--out is missing"),
  ("precompute", ["--out=o"], "--config is missing"),
  ("precompute", ["--config=nowhere.py", "--out=o"], "--config=nowhere.py: there is no file nowhere.py"),
  ("precompute", [DPO, "--out=/proc/x/y"], "/proc/x/y cannot be written"),
  ("precompute", [DPO, "--out=file"], "--out=file is a file"),
  ("precompute", [DPO, "--out=file/x"], "file/x cannot be written"),
  ("precompute", [DPO, "--out=full"], "--out=full is not empty and has no plan.json of an earlier r"),
  ("precompute", [DPO, "--out=~no-such-user/x"], "there is no user 'no-such-user'"),
  ("precompute", [DPO, "--out=~/file"], "--out=HOME/file is a file"),
  ("precompute", [DPO, "--out=o", "--batch_size=0"], "--batch_size=0"),
  ("precompute", [DPO, "--out=o", "--rows_per_file=-1"], "--rows_per_file=-1"),
  ("precompute", [DPO, "--out=o", "--batch_size=99999999999"], "--batch_size=99999999999"),
  ("precompute", [SPO, "--out=o"], "config.objective='spo' needs the VAE while it trains"),
  ("precompute", [DPO, "--out=o", "--config.model=~/nothing"], "model folder HOME/nothing does not exist"),
  ("precompute", [DPO, "--out=o", "--config.vae_model=~/nothing"], "model folder HOME/nothing does not exist"),
  (
    "precompute",
    [DPO, "--out=o", "--config.data.source=pairs_file", "--config.data.path=~/nothing.csv"],
    "there is no file HOME/nothing.csv",
  ),
  ("precompute", [DPO, "--out=o", "--config.model=flux.safetensors"], "flux.safetensors is Flux, expected a whole"),
  ("precompute", [DPO, "--out=o", "--config.model_config=empty"], "config.model_config (--model_config) is for a"),
  ("precompute", [DPO, "--out=o", "--config.seed=-1"], "config.seed=-1"),
  ("precompute", [DPO, "--out=o", "--config.image_size=32,30"], "config.image_size=(32, 30): images of 32 x 30 pixels"),
  ("precompute", ["--verify", "--out=~/nothing"], "HOME/nothing has no manifest.json"),
  ("precompute", ["--verify", "--out=full"], "full has no manifest.json"),
  ("describe", [], "the following arguments are required: SOURCE"),
  ("describe", ["~/nothing"], "there is no file or folder HOME/nothing."),
  ("describe", ["~no-such-user/x"], "there is no user 'no-such-user'"),
  ("describe", ["empty"], "empty holds no dataset_info.json"),
  ("describe", ["file"], "file is none of tfds"),
  ("describe", ["broken.json"], "broken.json is not JSON"),
  ("describe", ["prompts.txt", "--seed=-1"], "--seed=-1"),
  ("describe", ["prompts.txt", "--seed=4294967301"], "--seed=4294967301"),
  ("describe", ["prompts.txt", "--sample=0"], "--sample=0"),
  ("describe", ["prompts.txt", "--pictures=-1"], "--pictures=-1"),
  ("describe", ["prompts.txt", "--kind=nothing"], "argument --kind: invalid choice: 'nothing'"),
  ("describe", ["prompts.txt", "--tokenizer=~/nothing"], "HOME/nothing has no vocab.json and no tokenizer.json"),
  ("describe", ["prompts.txt", "--out=/proc/x/y"], "--out=/proc/x/y cannot be written"),
  ("describe", ["prompts.txt", "--out=file"], "--out=file is a file"),
  ("describe", ["prompts.txt", "--out=~no-such-user/x"], "there is no user 'no-such-user'"),
  ("describe", ["binary.txt"], "binary.txt is not UTF-8 text"),
  ("compile", [], "--config is missing"),
  ("compile", ["--config=nowhere.py"], "--config=nowhere.py: there is no file nowhere.py"),
  ("compile", [*MINI, "--topology=h300:8"], "--topology="),
  ("compile", [*MINI, "--topology=h200:0"], "--topology="),
  ("compile", [*MINI, "--topology=h200:x"], "--topology="),
  ("compile", [DPO, "--out=/proc/x/y.json"], "--out=/proc/x/y.json"),
  ("compile", [DPO, "--out=empty"], "--out=empty"),
  ("compile", [DPO, "--out=~no-such-user/x.json"], "there is no user 'no-such-user'"),
  ("compile", [DPO, "--out=~/nothing/x.json"], "--out=HOME/nothing/x.json"),
  ("compile", [*MINI, "--config.seed=4294967301"], "config.seed=4294967301"),
  ("compile", [*MINI, "--config.batch_size=0"], "config.batch_size=0"),
  ("compile", [*MINI, "--config.image_size=16,9"], "config.image_size=(16, 9): images of 16 x 9 pixels"),
  ("compile", [*MINI, "--config.mesh.data=3"], "mesh: data=3"),
  ("compile", [DPO, "--config.model=~/nothing"], "config.model=~/nothing: its shapes are not known here"),
  ("compile", [DPO, "--config.model=flux.safetensors"], "flux.safetensors is Flux, expected a whole checkpoint"),
  ("compile", [DPO, "--config.model=sd1.safetensors"], "(its UNet) does not hold the tensors that Stable Diffusion 1"),
  ("replay", [], "the following arguments are required: FOLDER"),
  ("replay", ["~/nothing"], "HOME/nothing holds no report.json"),
  ("replay", ["~no-such-user/x"], "there is no user 'no-such-user'"),
  ("replay", ["file"], "file holds no report.json"),
  ("replay", ["empty"], "empty holds no report.json"),
  ("replay", ["full"], "full holds no report.json"),
  ("replay", ["begun"], "begun holds no report.json"),
  ("replay", ["/proc/x/y"], "/proc/x/y holds no report.json"),
  ("replay", ["empty", "stray"], "unrecognized arguments: stray"),
  ("replay", ["empty", "--debug"], "empty holds no report.json"),
  ("pickapic", [], "the following arguments are required: --parquet"),
  ("pickapic", ["--parquet=~/nothing", "--out=o"], "HOME/nothing is not a folder"),
  ("pickapic", ["--parquet=empty", "--out=o"], "empty is not a folder"),
  ("pickapic", ["--parquet=full", "--out=o"], "full holds no files such as train-00000"),
  ("pickapic", ["--parquet=file", "--out=o"], "file is not a folder"),
  ("pickapic", ["--parquet=~no-such-user/x", "--out=o"], "there is no user 'no-such-user'"),
  ("pickapic", ["--parquet=empty", "--out=~no-such-user/x"], "there is no user 'no-such-user'"),
  ("pickapic", ["--parquet=full", "--out=/proc/x/y"], "full holds no files such as train-00000"),
  ("pickapic", ["--parquet=empty", "--out=o", "--workers=0"], "--workers=0"),
  ("pickapic", ["--parquet=empty", "--out=o", "--workers=99999999999"], "--workers=99999999999"),
  ("pickapic", ["--parquet=empty", "--out=o", "--version=v3"], "argument --version: invalid choice: 'v3'"),
]


def prepare(place):
  """Makes what the table names in a folder, in which its commands run; returns the environment that they have."""
  for name in ("home", "recipes", "full", "empty", "begun"):
    (place / name).mkdir()
  for file in (REPOSITORY / "configs").glob("*_tiny.py"):
    shutil.copy(file, place / "recipes")
  for name in ("file", "home/file", "full/thesis.tex"):
    (place / name).write_text("x")
  (place / "prompts.txt").write_text("red apple\nvolcano\n")
  (place / "empty.txt").write_text("\n")
  (place / "half.json").write_text(json.dumps(["a \ud83d"]))
  (place / "broken.json").write_text("{")
  ranking = {"prompt": "cat", "image_path": ["a.png", "b.png"], "human_preference": [1, 0]}
  (place / "rankings.json").write_text(json.dumps([ranking]))
  (place / "broken.safetensors").write_bytes(b"xx")
  (place / "model.ckpt").write_bytes(b"xx")
  unet = "model.diffusion_model."
  _empty_tensors(place / "flux.safetensors", {f"{unet}double_blocks.0.img_attn.qkv.weight": (3, 3)})
  known = {f"{unet}input_blocks.0.0.weight": (320, 4, 3, 3)}
  known[f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = (320, 768)
  _empty_tensors(place / "sd1.safetensors", known)
  (place / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
  (place / "begun" / "config.json").write_text("{}")
  own = {"HOME": str(place / "home"), "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
  own |= {"WANDB_MODE": "online"}
  own |= {"JAXPREF_DATA_DIR": str(place.parent / "datasets"), "JAX_COMPILATION_CACHE_DIR": f"{place}-compiled"}
  own["PYTHONDONTWRITEBYTECODE"] = "1"  # of the recipes
  return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "WANDB_API_KEY")} | own


def _empty_tensors(file, shapes):
  import numpy as np
  import safetensors.numpy

  safetensors.numpy.save_file({name: np.zeros(shape, np.float16) for name, shape in shapes.items()}, file)


def child(command, arguments):
  """Runs a command line to its end, as the interpreter would."""
  module, name = MODULES[command]
  sys.argv = [module, *arguments]
  try:
    getattr(importlib.import_module(module), name)()
  except SystemExit as ended:
    if isinstance(ended.code, str):
      print(ended.code, file=sys.stderr)
      return 1
    return ended.code or 0
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def serve():
  for name in ("training.loop", *(m.removeprefix("jaxpref.") for m, _ in MODULES.values() if m != "jaxpref.main")):
    importlib.import_module(f"jaxpref.{name}")
  import configparser  # noqa: F401

  import jinja2  # noqa: F401
  import orbax.checkpoint  # noqa: F401
  import tensorflow_datasets  # noqa: F401

  from jaxpref.files import tokenizers

  tokenizers.import_tokenizer("CLIPTokenizer")  # else each child that opens a model takes a second for it
  gc.freeze()  # a child that collects garbage would copy all pages

  for line in sys.stdin:
    command, arguments = json.loads(line)
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir="/tmp") as said:
      pid = os.fork()
      if pid == 0:
        signal.alarm(60)
        os.dup2(said.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = child(command, arguments)
        sys.stderr.flush()
        os._exit(code)
      code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
      said.seek(0)
      print(json.dumps([code, said.read()]), flush=True)


if __name__ == "__main__":
  serve()
