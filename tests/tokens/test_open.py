"""What the user is told of sets that have to be made."""

from tiny import preferences, write_preferences

from raydpo.config import DataConfig
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.storage.files import Storage
from raydpo.tokens.build import make_set
from raydpo.tokens.open import OpenSets


def test_a_damaged_set_is_not_explained_by_the_settings_of_another(tmp_path, tiny_llama):
    write_preferences(tmp_path / "a.jsonl", preferences(6))
    tokeniser = Tokeniser(load_tokenizer(str(tiny_llama)))

    def opened(limit=None):
        data = DataConfig(train=[{"path": str(tmp_path / "a.jsonl"), "limit": limit}])
        return data, OpenSets(data, Storage(str(tmp_path / "cache")), tiny_llama, lambda: tokeniser)

    for limit in (3, None):
        data, sets = opened(limit)
        (each,) = sets.missing()
        make_set(each.stored, each.source, data, tokeniser)
    (block,) = (tmp_path / "cache" / each.stored.directory / "blocks").iterdir()
    block.unlink()
    _, sets = opened()
    (each,) = sets.missing()
    (line,) = sets.why(each)
    assert "missing or damaged; it is made again" in line
    _, sets = opened(4)
    (each,) = sets.missing()
    (line,) = sets.why(each)
    assert "tokenised anew, not read from set" in line and "limit of the source: 4 here" in line
