#!/usr/bin/env python3
"""Random Unicode strings encoded by vesper and by the reference implementations of each tokenizer: ids must be equal.

    compare_tokenizers.py VESPER ASSETS [--strings 100000] [--seed 0] [--only NAME]

ASSETS holds tokenizers/{llama2,llama3,mistral7b,qwen2.5} as Hugging Face and Mistral publish them. Needs Python packages
tokenizers, transformers, tiktoken and sentencepiece. Prints a line for each vocabulary, file format and mode; ends with
exit code 1 where ids differ.
"""
import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
WORDS = ("the of and to in a is that for it was on are with as I his they be at one have this from or had by hot but "
         "some what there we can out other were all your when up use word how said an each she which do their if will "
         "don't we're I've he'd y'all IT'S can'T über naïve façade Straße l'été").split()
SPECIAL = ("<s> </s> <unk> <0x0A> <0xFF> [INST] [/INST] [TOOL_CALLS] <|begin_of_text|> <|end_of_text|> <|eot_id|> "
           "<|start_header_id|> <|im_start|> <|im_end|> <|endoftext|> <tool_call> </tool_call> <|fim_prefix|> "
           "<|reserved_special_token_7|> <|im_ <| |> < >").split(" ")
# (first, last) code points of what the categories below are drawn from.
SCRIPTS = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F),
           (0xE00, 0xE7F), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x1F00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x218F),
           (0x2190, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFE00, 0xFFEF),
           (0x10000, 0x103FF), (0x16F00, 0x16FFF), (0x1D100, 0x1D7FF), (0x1F000, 0x1FAFF), (0x20000, 0x2A6DF),
           (0x30000, 0x323AF), (0x1D2C0, 0x1D2D3), (0x11F00, 0x11F5A), (0x2EBF0, 0x2EE5D), (0x10D40, 0x10D8F), (0x1E4D0, 0x1E4F9),
           (0xE0000, 0xE01EF), (0x80, 0xFFFF), (0x80, 0x10FFFF)]
SPACES = " \t\n\r\x0b\x0c\x85\xa0\u1680\u180e\u2000\u2003\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
MARKS = [c for c in map(chr, range(0x300, 0x20000)) if unicodedata.combining(c)]
EMOJI = ["\U0001F600", "\U0001F469\u200D\U0001F680", "\U0001F1E9\U0001F1EA", "\u2764\uFE0F", "\U0001F44D\U0001F3FD"]


def random_char(draw, first, last):
    while True:
        code = draw.randint(first, last)
        if not 0xD800 <= code <= 0xDFFF:
            return chr(code)


def random_piece(draw):
    kind = draw.randrange(12)
    if kind <= 3:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 6))) + draw.choice(["", " ", ", ", ". ", "\n", "!"])
    if kind == 4:
        first, last = draw.choice(SCRIPTS)
        return "".join(random_char(draw, first, last) for _ in range(draw.randint(1, 12)))
    if kind == 5:
        return "".join(draw.choices(SPACES, k=draw.randint(1, 3)))
    if kind == 6:
        return draw.choice(" \n\t\r") * draw.randint(1, 40)
    if kind == 7:
        return str(draw.randrange(10 ** draw.randint(1, 14)))
    if kind == 8:
        return draw.choice("aeiouAcnS中가\u1100") + "".join(draw.choices(MARKS, k=draw.randint(1, 5)))
    if kind == 9:
        return draw.choice(EMOJI) * draw.randint(1, 3)
    if kind == 10:
        return draw.choice(SPECIAL)
    return "".join(chr(draw.randrange(128)) for _ in range(draw.randint(1, 10)))


def random_strings(count, seed):
    draw = random.Random(seed)
    return ["".join(random_piece(draw) for _ in range(draw.randrange(8))) for _ in range(count)]


def hf_reference(tokenizer):
    def encode(strings, special):
        tokenizer.encode_special_tokens = not special
        return [e.ids for e in tokenizer.encode_batch(strings, add_special_tokens=False)]
    return encode


def tiktoken_reference(folder):
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    config = json.loads((folder / "tokenizer_config.json").read_text())
    special = {token["content"]: int(i) for i, token in config["added_tokens_decoder"].items()}
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN,
                                 mergeable_ranks=load_tiktoken_bpe(str(folder / "tokenizer.model")), special_tokens=special)

    def encode(strings, parse_special):
        if not parse_special:
            return encoding.encode_ordinary_batch(strings)
        return encoding.encode_batch(strings, allowed_special="all")
    return encode


def sentencepiece_reference(path):
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def encode(strings, special):
        return None if special else model.encode(strings)  # it has no mode that parses the names of control pieces
    return encode


def llama3_json(folder):
    """What Hugging Face publishes as Llama 3's tokenizer.json, from the parts that are at hand."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()]
    vocab = json.loads((folder / "vocab.json").read_text())
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = sorted((int(i), token["content"]) for i, token in config["added_tokens_decoder"].items())
    tokenizer.add_special_tokens([AddedToken(content, special=True, normalized=False) for _, content in added])
    return tokenizer


def arms(assets, work):
    """(name, folder for vesper, reference) of each vocabulary and file format."""
    from tokenizers import Tokenizer
    from transformers import LlamaTokenizer, Qwen2Tokenizer
    tokenizers = assets / "tokenizers"

    def folder_of(name, files):
        folder = work / name
        folder.mkdir()
        for target, content in files.items():
            if isinstance(content, Path):
                shutil.copy(content, folder / target)
            else:
                content.save(str(folder / target))
        return folder

    llama2 = tokenizers / "llama2"
    yield "llama2 tokenizer.json", llama2, hf_reference(Tokenizer.from_file(str(llama2 / "tokenizer.json")))
    yield ("llama2 tokenizer.model", folder_of("llama2-model", {"tokenizer.model": llama2 / "tokenizer.model"}),
           sentencepiece_reference(llama2 / "tokenizer.model"))
    yield "llama3 tokenizer.model", tokenizers / "llama3", tiktoken_reference(tokenizers / "llama3")
    llama3 = llama3_json(tokenizers / "llama3")
    yield "llama3 tokenizer.json", folder_of("llama3-json", {"tokenizer.json": llama3}), hf_reference(llama3)
    mistral = tokenizers / "mistral7b"
    model = folder_of("mistral-model", {"tokenizer.model": mistral / "v3.model",
                                        "tokenizer_config.json": mistral / "tokenizer_config.json"})
    yield "mistral v3 tokenizer.model", model, sentencepiece_reference(mistral / "v3.model")
    for legacy in (True, False):
        converted = LlamaTokenizer.from_pretrained(str(model), legacy=legacy).backend_tokenizer
        yield (f"mistral v3 tokenizer.json, legacy {legacy}".lower(),
               folder_of(f"mistral-json-{legacy}", {"tokenizer.json": converted}), hf_reference(converted))
    qwen = Qwen2Tokenizer.from_pretrained(str(tokenizers / "qwen2.5")).backend_tokenizer
    yield "qwen2.5 vocab.json", tokenizers / "qwen2.5", hf_reference(qwen)
    yield "qwen2.5 tokenizer.json", folder_of("qwen-json", {"tokenizer.json": qwen}), hf_reference(qwen)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vesper")
    parser.add_argument("assets", type=Path)
    parser.add_argument("--strings", type=int, default=100000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names that begin so")
    options = parser.parse_args()
    strings = random_strings(options.strings, options.seed)
    failed = False
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (work / "strings.jsonl").write_text("".join(json.dumps(s) + "\n" for s in strings))
        for name, folder, reference in arms(options.assets, work):
            if not name.startswith(options.only):
                continue
            for special in (False, True):
                expected = reference(strings, special)
                if expected is None:
                    continue
                command = [options.vesper, "tokenize", "--model", folder, "--jsonl", work / "strings.jsonl"]
                output = subprocess.run(command + ["--special"] * special, check=True, capture_output=True, text=True).stdout
                found = [[int(i) for i in line.split()] for line in output.split("\n")[:-1]]
                wrong = [i for i, (f, e) in enumerate(zip(found, expected)) if f != e]
                failed = failed or bool(wrong) or len(found) != len(strings)
                print(f"{name}{', special tokens parsed' if special else ''}: {len(found)} strings, "
                      f"{sum(map(len, found))} ids, {len(wrong)} differ", flush=True)
                for i in wrong[:3]:
                    print(f"  {json.dumps(strings[i])}\n    expected {expected[i]}\n    found    {found[i]}")
    sys.exit(1 if failed else 0)


main()
