"""Which users a candidate answers."""

from hashlib import blake2b


def takes_candidate(who: str, salt: str, share: float) -> bool:
    """Whether `who` (a user, a key, or else a request) belongs to the `share` of users, 0 to 1, with the candidate.

    Whoever has it at one share has it at every larger one. Another `salt` picks other users: nobody is the first to
    meet every candidate.
    """
    # A name from a header may hold half of a surrogate pair, which plain UTF-8 refuses.
    digest = blake2b(f"{salt}\n{who}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64
