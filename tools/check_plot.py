#!/usr/bin/env python3
"""Checks the page of `dlf-engine plot` in headless Chromium.

    python3 tools/check_plot.py --binary target/release/dlf-engine

Draws docs/generation.jsonl and a trace of 1,500 hard tokens, and checks at 360 and 1440 px, light and dark: no error, no
request, no sideways scrolling, one tab stop, arrow keys that change what is shown, text of contrast 4.5:1 or more.
Needs tools/requirements-browser.txt and a Chromium (Debian's `chromium`, or --chromium). --shots DIR keeps pictures.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
TOKENS = [" the", "cat", "\n", "字", "👩‍👩‍👧", "</script><script>alert(1)</script>", "\u202eabc", "=" * 150, "\x00", "", " ", "مرحبا",
          "&amp;", "\t", " antidisestablishmentarianism"]

# The contrast of every text with what is behind it; the worst, and whose it is.
CONTRAST = """() => {
  const parts = (color) => {
    const n = color.match(/[\\d.e-]+/g).map(Number);
    const unit = color.startsWith("color(");
    return [n[0], n[1], n[2]].map((v) => unit ? v : v / 255).concat(n.length > 3 ? n[3] : 1);
  };
  const light = (c) => c.slice(0, 3).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parts(getComputedStyle(e).backgroundColor);
      if (c[3] > 0.99) return c;
    }
    return [1, 1, 1, 1];
  };
  let worst = [99, ""], seen = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || e.closest("script") || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), text = parts(e.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(text), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    seen += 1;
    if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 120)];
  }
  return [...worst, seen];
}"""

# Whether what has the focus is on top where its first line begins.
SEEN = """() => {
  const box = document.activeElement.getClientRects()[0];
  const top = document.elementFromPoint(box.left + Math.min(box.width / 2, 8), box.top + box.height / 2);
  return document.activeElement.contains(top);
}"""


def hard_trace(path):
    """Tokens that break pages, from three prompts, with every kind of missing value."""
    with path.open("w") as file:
        for step in range(1500):
            prompt, token = (step >= 1400) + (step >= 1499), TOKENS[step % len(TOKENS)]
            fused = step % 7 != 0
            record = {
                "prompt_index": prompt, "step": step, "token_id": step, "text": token,
                "expert": ["facts", "sums & more", "a third"][step % 3] if fused else None,
                "alpha": [[0.5, 0, 0], [0, 1.25, 0], [0, 0, 1.9]][step % 3] if fused else [],
                "loss": 10.0 ** -(step % 14) if fused else None,
                "kl_fused_large": (step % 11) / 10 if fused else None,
                "kl_large_fused": 0.0 if fused else None,
                "kl_expert_small": [0.1, 0.01, 1e-12] if fused else [],
                "kl_small_expert": [3.0, 0.01, 0.0] if fused else [],
                "argmax_large": step + 1, "argmax_large_text": TOKENS[(step + 1) % len(TOKENS)],
                "argmax_expert": [1, 2, 3], "argmax_expert_text": ["one", "</script>", "\n"],
                "changed": step % 2 == 0,
            }
            file.write(json.dumps(record) + "\n")


def check(page, name):
    """What is wrong with the page as it is now."""
    faults = []
    wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    if wide[0] > wide[1]:
        faults.append(f"scrolls sideways: {wide[0]} > {wide[1]}")
    for by in ("expert", "alpha"):
        page.locator(f"[name=by][value={by}]").check()
        for _ in ("one theme", "the other"):
            ratio, where, seen = page.evaluate(CONTRAST)
            if ratio < 4.5 or seen < 20:
                faults.append(f"contrast {ratio:.2f} of {seen} texts, by {by}: {where}")
            page.locator("#theme").click()
    # The button was the last to have the focus: the tokens are the next stop, and one only.
    page.keyboard.press("Tab")
    focused = "document.activeElement.getAttribute('role') === 'option' ? document.activeElement.id : null"
    if page.evaluate(focused) != "t0":
        faults.append("the first token is not the stop after the button")
    before = page.locator("#detail").inner_text()
    for key, expected in (("ArrowRight", "t1"), ("ArrowRight", "t2"), ("ArrowLeft", "t1")):
        page.keyboard.press(key)
        after = page.locator("#detail").inner_text()
        if page.evaluate(focused) != expected or after == before:
            faults.append(f"{key} does not go to {expected} and show it")
        before = after
    for key in ["ArrowDown"] * 40 + ["End", "ArrowDown", "Home"]:
        page.keyboard.press(key)
        down = page.evaluate(focused)
        if not page.evaluate(SEEN):
            faults.append(f"after {key}, {down} has the focus and is hidden")
    page.keyboard.press("Tab")
    if page.evaluate(focused) is not None:
        faults.append(f"a second tab stop after {down}")
    if page.locator("[role=option][tabindex='0']").count() != 1:
        faults.append("not one tab stop")
    return [f"{name}: {fault}" for fault in faults]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, required=True)
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--shots", type=Path)
    arguments = parser.parse_args()
    if not arguments.chromium:
        sys.exit("no Chromium: apt-get install chromium, or give --chromium")
    faults, checks = [], 0
    with tempfile.TemporaryDirectory() as directory, sync_playwright() as playwright:
        hard = Path(directory) / "hard.jsonl"
        hard_trace(hard)
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        for trace in (ROOT / "docs" / "generation.jsonl", hard):
            html = Path(directory) / f"{trace.stem}.html"
            subprocess.run([arguments.binary.resolve(), "plot", trace, "--output", html], check=True, stdout=subprocess.DEVNULL)
            for width in (360, 1440):
                for scheme in ("light", "dark"):
                    name = f"{trace.stem}-{width}-{scheme}"
                    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                    page.on("console", lambda message: faults.append(f"{name}: {message.text}"))
                    page.on("pageerror", lambda error: faults.append(f"{name}: {error}"))
                    requests = []
                    page.on("request", lambda request: requests.append(request.url))
                    page.goto(html.as_uri())
                    faults += check(page, name)
                    if requests != [html.as_uri()]:
                        faults.append(f"{name}: requests {requests}")
                    if arguments.shots:
                        page.keyboard.press("Shift+Tab")
                        page.screenshot(path=arguments.shots / f"{name}.png")
                    page.close()
                    checks += 1
        browser.close()
    for fault in faults:
        print(fault)
    print(f"{checks} pages checked, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
