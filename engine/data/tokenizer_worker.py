"""Child process that encodes texts: one thread each, so that many of them share no lock.

engine/data/tokenizer_processes.py starts it as a script, so it imports no module of this program. The first line on
stdin is the tokenizer. Each other line asks for texts. A reply is a line with two numbers, so many ids, int32, and the
lengths of so many texts, int64.
"""

import json
import sys

import numpy as np
from tokenizers import Tokenizer


def main() -> None:
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    tokenizer = Tokenizer.from_str(json.loads(requests.readline()))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for line in requests:
        texts, parse_special_tokens = json.loads(line)
        tokenizer.encode_special_tokens = not parse_special_tokens
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = np.concatenate([np.empty(0, np.int32), *(np.array(encoding.ids, np.int32) for encoding in encodings)])
        lengths = np.array([len(encoding.ids) for encoding in encodings], np.int64)
        replies.write(f"[{len(ids)}, {len(lengths)}]\n".encode() + ids.tobytes() + lengths.tobytes())
        replies.flush()


if __name__ == "__main__":
    main()
