"""Draws docs/images/blind.png, the page of a blind comparison after a simulated voter's last vote.

    python -m jaxpref.taste --prompts=emoji:train --num_prompts=64 --guidance_scale=3.5 --label=judge --out=runs/taste
    python scripts/docs/shoot_blind.py runs/taste/runs/round_0 runs/blind

The first command aligns tiny-sd with the shipped judge's preference for OpenMoji, and the voter of the second one
votes as that judge does. So the picture shows the page, and says nothing about people. Needs chromium and
chromium-driver, and the packages selenium and jaxpref[web].
"""

import argparse
import io
import json
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request
from typing import Any

import numpy as np
from PIL import Image

from jaxpref.rewards import published

OUT = pathlib.Path(__file__).resolve().parents[2] / "docs" / "images" / "blind.png"
NAME, PORT = "simulated voter", 8425
DESKTOP, PHONE = (980, 660), (390, 660)  # pixels of the pages


def ask(link: str, path: str, body: dict[str, Any] | None = None) -> bytes:
  """Sends a request to the server of a link, and returns the answer."""
  address, _, token = link.partition("/#")
  headers = {"Authorization": f"Bearer {token}", "Origin": address, "Content-Type": "application/json"}
  content = None if body is None else json.dumps(body).encode()
  with urllib.request.urlopen(urllib.request.Request(address + path, content, headers), timeout=60) as answer:
    return bytes(answer.read())


def vote(link: str) -> None:
  """Votes as the judge until voting has ended."""
  judge = published.load("judge").score
  while True:
    found = json.loads(ask(link, "/api/next", {"voter": NAME}))
    if found["progress"]["state"] == "ended":
      return
    for pair in found["pairs"][:1]:
      sides = [ask(link, f"/picture/{pair['ask']}/{side}") for side in "ab"]
      images = [np.asarray(Image.open(io.BytesIO(side)).convert("RGB")) for side in sides]
      a, b = np.asarray(judge(images, [pair["caption"]] * 2))
      choice = "left" if a > b else "right"
      ask(link, "/api/vote", {"voter": NAME, "ask": pair["ask"], "choice": choice})
    if not found["pairs"]:
      time.sleep(0.2)


def shoot(link: str, size: tuple[int, int], *, dark: bool) -> Image.Image:
  """Returns what a browser shows as the summary."""
  from selenium import webdriver
  from selenium.webdriver.chrome.service import Service
  from selenium.webdriver.support.ui import WebDriverWait

  options = webdriver.ChromeOptions()
  options.binary_location = "/usr/bin/chromium"
  for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
    options.add_argument(f"--{option}")
  driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
  try:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": dark}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get(link)
    find = lambda selector: driver.find_element("css selector", selector)
    waiting = WebDriverWait(driver, 20)
    waiting.until(lambda _: find("#name").is_displayed())
    find("#name").send_keys(NAME)
    find("#name-form button").click()
    waiting.until(lambda _: find("#rest [data-go=summary]").is_displayed())
    find("#rest [data-go=summary]").click()
    waiting.until(lambda _: find("#results").text)
    return Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
  finally:
    driver.quit()


def main() -> None:
  """Compares tiny-sd with a run, votes, and writes the picture."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("run", help="work folder of the run that is compared with tiny-sd")
  parser.add_argument("out", help="folder for pictures, votes and results")
  args = parser.parse_args()
  command = [sys.executable, "-m", "jaxpref.blind", "--models", "base=tiny-sd", f"aligned={args.run}"]
  command += ["--prompts=emoji", "--num_prompts=60", "--guidance_scale=3.5", f"--out={args.out}", f"--port={PORT}"]
  served = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  assert served.stdout is not None
  try:
    link = served.stdout.readline().strip()
    vote(link)
    pages = shoot(link, DESKTOP, dark=False), shoot(link, PHONE, dark=True)
  finally:
    served.send_signal(signal.SIGINT)
    served.wait()
  whole = Image.new("RGB", (DESKTOP[0] + PHONE[0], max(DESKTOP[1], PHONE[1])))
  whole.paste(pages[0], (0, 0))
  whole.paste(pages[1], (DESKTOP[0], 0))
  whole.quantize(128).save(OUT, optimize=True)
  print(OUT)


if __name__ == "__main__":
  main()
