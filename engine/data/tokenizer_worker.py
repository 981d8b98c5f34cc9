"""Child process that encodes texts: one thread each, so that many of them share no lock.

engine/data/tokenizer_processes.py starts it as a script, so it imports no module of this program. Requests and replies
are pickles: the tokenizer as JSON, then lists of texts for arrays of their ids and lengths.
"""

import pickle
import sys

import numpy as np
from tokenizers import Tokenizer


def main() -> None:
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    tokenizer = Tokenizer.from_str(pickle.load(requests))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    while True:
        try:
            texts, parse_special_tokens = pickle.load(requests)
        except EOFError:
            return
        tokenizer.encode_special_tokens = not parse_special_tokens
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        parts = [np.array(encoding.ids, np.int32) for encoding in encodings]
        lengths = np.array(list(map(len, parts)), np.int64)
        pickle.dump((np.concatenate([np.empty(0, np.int32), *parts]), lengths), replies, pickle.HIGHEST_PROTOCOL)
        replies.flush()


if __name__ == "__main__":
    main()
