"""Reward ``json``: strict reading, schemas of several drafts, nothing fetched."""

from __future__ import annotations

import json

import pytest

from raydpo.config.rewards import RewardConfig
from raydpo.rewards.sources import open_built_in


def verdict(text, schema=None, **options):
    """The reward of an answer, and why it is 0."""
    said = {}
    columns = {} if schema is None else {"schema": [schema]}
    options |= {} if schema is None else {"column": "schema"}
    function = open_built_in(RewardConfig(use="json", **options))
    (reward,) = function(completions=[text], log_extra=said.__setitem__, **columns)
    return reward, said["json"][0]


JSON = ('{"a": 1}', " [1, 2.5e3]\n", '"x"', "null", "-0", "1" * 5000, '{"a": {"a": []}}', '"\\ud800"')
NOT_JSON = (
    *("", "x", "NaN", "[Infinity]", "-Infinity", '{"a": 1, "a": 1}', '[{"a": 1, "b": {"c": 1, "c": 2}}]', "[1,]"),
    *("{'a': 1}", "01", "+1", ".5", '{"a": 1} x', "```json\n{}\n```", '"a\nb"', "\ufeff{}", "True"),
    *("[" * 100_000, "[" * 5000 + "]" * 5000),
)


@pytest.mark.parametrize("text", JSON)
def test_json(text):
    assert verdict(text) == (1.0, None)


@pytest.mark.parametrize("text", NOT_JSON)
def test_not_json(text):
    reward, why = verdict(text)
    assert reward == 0.0 and why.startswith("not JSON: ")


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Here:\n```json\n{}\n```\nDone.", 1.0),
        ("```\n[1]\n```", 1.0),
        ("```json\n{]\n```\nbut {}", 0.0),  # what stands in the only block counts
        ("```\n{}\n```\n```\n{]\n```", 1.0),  # two blocks: what begins at the first bracket
        ('Sure: {"a": [1]} and {]', 1.0),
        ('{"a": {"b": 1},}', 0.0),  # no part of broken JSON counts
        ("I have 3", 0.0),
        (" 3 ", 1.0),
    ],
)
def test_text_around_it(text, reward):
    assert verdict(text, whole=False)[0] == reward
    assert text == " 3 " or verdict(text)[0] == 0.0


def test_schemas():
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 3}}, "required": ["a"]}
    for form in (schema, json.dumps(schema)):
        assert verdict('{"a": 3}', form) == (1.0, None)
        assert verdict('{"a": 4}', form) == (0.0, "$.a: 4 is greater than the maximum of 3")
        assert verdict("{}", form) == (0.0, "$: 'a' is a required property")
        assert verdict("{", form)[0] == 0.0
    assert verdict("{}", "false")[0] == 0.0 and verdict("{}", "true") == (1.0, None)
    (reward,) = open_built_in(RewardConfig(use="json", column="s"))(completions=["{"], log_extra=lambda *_: None, s=[None])
    assert reward is None


def test_drafts():
    """Draft 4 has a boolean exclusiveMaximum, later ones a number; 2020-12 has prefixItems."""
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 3, "exclusiveMaximum": True}
    assert verdict("3", old)[0] == 0.0 and verdict("2", old)[0] == 1.0
    new = {"prefixItems": [{"type": "string"}]}
    assert verdict("[1]", new)[0] == 0.0
    assert verdict("[1]", {"$schema": "http://json-schema.org/draft-07/schema#", **new})[0] == 1.0
    assert verdict('{"type": 5}', {"$ref": "https://json-schema.org/draft/2020-12/schema"})[0] == 0.0
    assert verdict('{"type": "object"}', {"$ref": "https://json-schema.org/draft/2020-12/schema"})[0] == 1.0
    assert verdict("1", {"$defs": {"t": {"type": "string"}}, "$ref": "#/$defs/t"})[0] == 0.0


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ("{", "is not JSON"),
        (3, "is a int; expected an object"),
        ({"type": 5}, "is not valid: $.type"),
        ({"$schema": "http://localhost/none"}, "unknown $schema 'http://localhost/none'"),
        ({"$schema": 5}, "unknown $schema 5"),
        ({"$schema": []}, "unknown $schema []"),
        ({"$ref": "#/$defs/none"}, "which is not in it; nothing is fetched"),
        ({"$ref": "#"}, "the schema refers to itself without end"),
    ],
)
def test_a_wrong_schema_is_an_error_and_not_a_reward(schema, said):
    reward, _ = verdict("{}", schema)
    assert isinstance(reward, ValueError) and said in str(reward)


def test_nothing_is_fetched():
    import http.server
    import threading

    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reward, _ = verdict("{}", {"$ref": f"http://127.0.0.1:{server.server_port}/schema"})
        server.shutdown()
    assert isinstance(reward, ValueError) and "nothing is fetched" in str(reward) and not asked


@pytest.mark.parametrize(
    ("answer", "schema"),
    [
        ('{"a":' * 400 + "1" + "}" * 400, {"additionalProperties": {"$ref": "#"}, "type": ["object", "integer"]}),
        ("1" + "0" * 400, {"multipleOf": 0.01}),
        ("1e400", {"multipleOf": 0.01}),
    ],
)
def test_an_answer_that_no_schema_is_compared_with_costs_itself_only(answer, schema):
    reward, _ = verdict(answer, schema)
    assert isinstance(reward, ValueError) and "cannot be compared with this answer" in str(reward)
