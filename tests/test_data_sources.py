"""Reading user files and the embedded set; every bad input with its message."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from saess_jax.data import checks, sources


def write(path, text):
  path.write_text(text, encoding="utf-8")
  return str(path)


def test_csv_with_all_columns(tmp_path):
  path = write(tmp_path / "a.csv", 'prompt,response,label,category\n"Hi, ""you""\nthere",Hello,safe,chat\nKill,No,1,\n')
  assert sources.read_rows(path) == [
      sources.Row('Hi, "you"\nthere', "Hello", 0, "chat", "a.csv"), sources.Row("Kill", "No", 1, "", "a.csv")]


def test_several_files_keep_their_order_and_name(tmp_path):
  one = write(tmp_path / "one.jsonl", '{"goal": "a", "label": "unsafe"}\n\n{"goal": "b", "label": 0}\n')
  two = write(tmp_path / "two.txt", "c\n\n  d\u2028e\x0c\n")  # A prompt a line, and no other sign ends one.
  rows = sources.read_rows(f"{one}, {two}", default_label="harmful")
  assert [(row.prompt, row.label, row.source) for row in rows] == [
      ("a", 1, "one.jsonl"), ("b", 0, "one.jsonl"), ("c", 1, "two.txt"), ("  d\u2028e\x0c", 1, "two.txt")]


@pytest.mark.parametrize("columns, field", [
    *((name, "prompt") for name in (
        "prompt", "goal", "behavior", "Behavior", "instruction", "question", "text", "PROMPT")),
    *((f"prompt,{name}", "response") for name in ("response", "output", "answer", "refusal", "Safe_Response"))])
def test_column_names(tmp_path, columns, field):
  values = ["p"] * columns.count(",") + ["text"]
  path = write(tmp_path / "a.csv", f"{columns},id\n{','.join(values)},7\n")
  assert getattr(sources.read_rows(path, default_label=0)[0], field) == "text"


def test_first_prompt_column_in_the_documented_order_wins(tmp_path):
  path = write(tmp_path / "a.csv", "question,goal\nq,g\n")
  assert sources.read_rows(path, default_label=0)[0].prompt == "g"


def test_alpaca_input_belongs_to_the_prompt(tmp_path):
  path = write(tmp_path / "a.jsonl", '{"instruction": "Sum up:", "input": "A B.", "output": "AB"}\n')
  assert sources.read_rows(path, default_label=0)[0].prompt == "Sum up:\n\nA B."


# ---- Files of attacks


ATTACKS = (
    "Goal,prompt,response,label\nOpen it,Please open it,Sure,1\n open IT ,Open it now,No,1\nBake,I say: bake,,benign\n")


def test_what_attacks_ask_for_is_a_suite(tmp_path):
  path = write(tmp_path / "a.csv", ATTACKS)
  assert sources.read_requests(path, "malicious") == [
      sources.Row("Open it", "", 1, "", "a.csv"), sources.Row("Bake", "", 0, "", "a.csv")]
  assert [row.prompt for row in sources.read_rows(path, "malicious")] == [
      "Please open it", "Open it now", "I say: bake"]  # Training reads prompts.


@pytest.mark.parametrize("columns, targets", [
    ("goal,target", ["Sure, a", ""]), ("goal,target,prompt", ["Sure, a", ""]), ("prompt,target", ["", ""])])
def test_a_target_beside_a_goal_is_kept(tmp_path, columns, targets):
  path = write(tmp_path / "a.csv", f"{columns}\nmake a,\"Sure, a\",p\nmake b,,p\n".replace(
      ",p", ",p" if columns.count(",") == 2 else ""))
  assert [row.target for row in sources.read_requests(path, 1)] == targets


def test_an_artifact_is_a_suite_of_its_goals(tmp_path):
  path = write(tmp_path / "pair.json", json.dumps({"parameters": {}, "jailbreaks": [
      {"index": 0, "goal": "Open it", "behavior": "Things", "category": "acts", "prompt": "Please", "response": "No"},
      {"index": 1, "goal": "Shut it", "behavior": "Things", "category": "acts", "prompt": None, "response": None}]}))
  assert sources.read_requests(path, "malicious") == [
      sources.Row("Open it", "", 1, "acts", "pair.json"), sources.Row("Shut it", "", 1, "acts", "pair.json")]
  with pytest.raises(ValueError, match="ends in '.json'; expected .csv, .jsonl, .txt"):
    sources.read_rows(path, "malicious")


@pytest.mark.parametrize("columns, prompts", [
    ("id,prompt,type,label,focus,note", ["b", "w"]),  # XSTest's
    ("Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID",  # HarmBench's
     ["e\n\n---\n\na", "f\n\n---\n\nA"]),
    ("Behavior,FunctionalCategory,SemanticCategory,Tags,Text,BehaviorID", ["a"]),  # Each request once.
    ("Behavior,Prompt,SemanticCategory,Tags,ContextString,BehaviorID",  # An attack on them asks for the same.
     ["e\n\n---\n\na", "f\n\n---\n\nA"]),
    ("goal,prompt,a,label,b,c", ["a"]), ("prompt,BEHAVIOR,a,label,b,c", ["b", "w"])])
def test_columns_of_a_suite(tmp_path, columns, prompts):
  path = write(tmp_path / "a.csv", f"{columns}\na,b,c,safe,e,f\nA,w,c,safe,f,f\n")
  rows = sources.read_requests(path, "malicious")
  assert [row.prompt for row in rows] == prompts and {row.label for row in rows} == {int("label" not in columns)}


def test_rows_that_name_no_request_are_asked_as_they_stand(tmp_path):
  path = write(tmp_path / "a.jsonl", '{"prompt": "p", "goal": ""}\n{"prompt": "r"}\n{"prompt": "q", "behavior": "b"}\n')
  assert [row.prompt for row in sources.read_requests(path, 1)] == ["p", "r", "b"]


def test_a_request_is_asked_once_under_each_label(tmp_path):
  path = write(tmp_path / "a.csv", "prompt,label\nHow a,1\nhow A ,1\nHow b,1\nHow a,0\n")
  assert [(row.prompt, row.label) for row in sources.read_requests(path, 1)] == [
      ("How a", 1), ("How b", 1), ("How a", 0)]
  assert len(sources.read_rows(path)) == 4  # Training reads what stands there.


@pytest.mark.parametrize("name, text, message", [
    ("a.json", "{", "a.json is malformed JSON"), ("a.json", "[]", "a.json is no JailbreakBench artifact"),
    ("a.json", '{"jailbreaks": []}', "a.json is empty"),
    ("a.json", '{"jailbreaks": [{"goal": "a"}, {}]}', "a.json:2: no p"),
    ("a.csv", "goal,prompt\n ,p\n", "a.csv:2: prompt is ' '; expected text"),
    ("a.jsonl", '{"goal": "a", "target": 7}', "a.jsonl:1: target is 7; expected what an answer"),
    ("a.csv", f"goal,target\na,{'a' * 501}\n", "a text of 500 characters at most"),
    ("a.jsonl", '{"goal": "a", "target": "\\ud83d"}', "a.jsonl:1: target is .*half a surrogate pair"),
    ("a.jsonl", '{"goal": "a", "category": "\\ud83d"}', "a.jsonl:1: category is .*half a surrogate pair"),
    ("a.jsonl", '{"goal": ["a"], "prompt": "p"}', r"a.jsonl:1: prompt is \['a'\]; expected text")])
def test_bad_files_of_attacks(tmp_path, name, text, message):
  with pytest.raises(ValueError, match=message):
    sources.read_requests(write(tmp_path / name, text), "malicious")


def test_where_some_rows_have_a_label_all_must(tmp_path):
  path = write(tmp_path / "a.csv", "prompt,label\nHow a,benign\nHow b,\n")
  for read in (sources.read_rows, sources.read_requests):
    with pytest.raises(ValueError, match=r"a.csv:3: no label. Fill a column label .* in every row"):
      read(path, "malicious")


@pytest.mark.parametrize("word, label", [
    ("benign", 0), ("Safe", 0), ("harmless", 0), ("0", 0), ("malicious", 1), ("UNSAFE", 1), ("harmful", 1), ("1", 1)])
def test_label_words(tmp_path, word, label):
  path = write(tmp_path / "a.csv", f"prompt,label\np,{word}\n")
  assert sources.read_rows(path)[0].label == label


def test_json_numbers_and_byte_order_mark(tmp_path):
  path = write(
      tmp_path / "a.jsonl", '\ufeff{"prompt": "line\u2028separator", "label": 1}\n{"prompt": "q", "label": false}')
  assert [row.label for row in sources.read_rows(path)] == [1, 0]


@pytest.mark.parametrize("name, text, message", [
    ("a.csv", "", "a.csv is empty"),
    ("a.csv", "prompt,label\n", "a.csv is empty"),
    ("a.txt", "\n\n", "a.txt is empty"),
    ("a.csv", "prompt,label\np,1\nq, r,0\n", r"a.csv:3: 1 more fields than the 2 columns"),
    ("a.csv", "prompt,label\np\n", r"a.csv:2: no field for column label"),
    ("a.csv", 'prompt,label\n"p"x,1\n', r"a.csv:2: malformed CSV"),
    ("a.csv", "body,label\np,1\n", r"a.csv:2: no prompt column; expected one of prompt, goal.*found body, label"),
    ("a.csv", "prompt,label\n ,1\n", r"a.csv:2: prompt is ' '; expected text"),
    ("a.csv", "prompt,label\np,evil\n", r"a.csv:2: label is 'evil'; expected one of benign, safe"),
    ("a.csv", "prompt,label\np,\n", r"a.csv:2: no label.*default_label"),
    ("a.csv", "prompt\np\n", r"a.csv:2: no label"),
    ("a.jsonl", '{"prompt": "so \\ud83d", "label": 1}', r"a.jsonl:1: prompt is 'so .ud83d', with half a surr"),
    ("a.jsonl", '{"instruction": "Sum up:", "input": "so \\ud83d", "label": 1}', "1: instruction is .* half a surr"),
    ("a.jsonl", '{"prompt": "p", "label": 1, "response": "\\ud83d"}', r"a.jsonl:1: the response is '.ud83d'"),
    ("a.jsonl", '{"prompt": "p", "label": 1}\n{"prompt": \n', r"a.jsonl:2: malformed JSON"),
    ("a.csv", "prompt,label,label\np,0,1\n", "a.csv: two columns have one name, of prompt, label, label"),
    ("a.csv", "prompt,label,Label\np,0,1\n", "a.csv:2: two columns have one name.* of prompt, label, Label"),
    ("a.csv", "prompt,label,split\np,1,dev\n", "a.csv:2: split is 'dev'; expected one of train, validation, test"),
    ("a.csv", "prompt,label,split\np,1,test\nq,1,\n", "a.csv:3: no split, which other rows have"),
    ("a.jsonl", '["p"]\n', r"a.jsonl:1: a JSON list; expected one object a line"),
    ("a.jsonl", '{"prompt": 3, "label": 1}\n', r"a.jsonl:1: prompt is 3; expected text"),
    ("a.jsonl", '{"prompt": "p", "response": ["r"], "label": 1}\n', r"a.jsonl:1: the response is \['r'\]"),
    ("a.parquet", "x", r"ends in '.parquet'; expected .csv, .jsonl, .txt"),
])
def test_bad_files(tmp_path, name, text, message):
  path = write(tmp_path / name, text)
  with pytest.raises(ValueError, match=message):
    sources.read_rows(path)


def test_not_utf8(tmp_path):
  (tmp_path / "a.csv").write_bytes(b"prompt,label\n\xff\xfe,1\n")
  with pytest.raises(ValueError, match=r"a.csv is not UTF-8"):
    sources.read_rows(str(tmp_path / "a.csv"))


def test_missing_file_no_file_and_bad_default(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"gone.csv does not exist"):
    sources.read_rows(str(tmp_path / "gone.csv"))
  with pytest.raises(ValueError, match="No data file in ' , '"):
    sources.read_rows(" , ")
  with pytest.raises(ValueError, match="default_label: label is 'both'"):
    sources.read_rows(write(tmp_path / "a.txt", "p"), default_label="both")


def test_two_classes():
  rows = [sources.Row("a", "", 1, "", ""), sources.Row("b", "", 0, "", "")]
  sources.require_two_classes(rows, "x.csv")
  with pytest.raises(ValueError, match="x.csv has 0 benign and 1 malicious rows; training needs both"):
    sources.require_two_classes(rows[:1], "x.csv")


def test_one_label_of_each_prompt():
  rows = [sources.Row("a", "", 1, "", "a.csv"), sources.Row("b", "", 0, "", "a.csv")]
  sources.require_one_label(rows + rows)
  with pytest.raises(ValueError, match="' A' is malicious in a.csv and benign in b.csv; keep one of them"):
    sources.require_one_label([*rows, sources.Row(" A", "", 0, "", "b.csv")])


def test_rows_of_a_file_that_are_test_prompts_are_told(tmp_path, caplog):
  tests = sources.embedded_rows("test")[:40]
  records = [{"prompt": f"{row.prompt} ", "label": sources.LABELS[row.label]} for row in tests]
  path = write(tmp_path / "mine.jsonl", "".join(f"{json.dumps(record)}\n" for record in records))
  kept = [row.prompt for row in sources.load_split(path, "train")]
  assert f"{len(kept)} training rows of {path} are prompts of the embedded test split" in caplog.text
  caplog.clear()
  sources.read_splits("embedded,plain")
  assert not caplog.text


def embedded_folder(tmp_path, splits=("train", "validation", "test", "train")):
  records = [
      {"prompt": f"p{i}", "response": "r", "label": ("malicious", "benign")[i % 2], "category": "c",
       "source": "written", "idea": f"c-{i}", "form": "question", "split": split} for i, split in enumerate(splits)]
  folder = tmp_path / "_".join(splits)
  folder.mkdir(exist_ok=True)
  write(folder / "embedded.jsonl", "\n".join(map(json.dumps, records)))
  return folder


def test_embedded_rows(tmp_path):
  path = embedded_folder(tmp_path)
  assert sources.embedded_rows("train", path) == [
      sources.Row("p0", "r", 1, "c", "written"), sources.Row("p3", "r", 0, "c", "written")]
  assert [row.prompt for row in sources.embedded_rows("test", path)] == ["p2"]


def test_embedded_errors(tmp_path):
  with pytest.raises(ValueError, match="split is 'dev'; expected one of train, validation, test"):
    sources.embedded_rows("dev", embedded_folder(tmp_path))
  with pytest.raises(ValueError, match=r"embedded.jsonl:2: split is 'dev'"):
    sources.embedded_rows("train", embedded_folder(tmp_path, ("train", "dev")))
  with pytest.raises(ValueError, match=r"train_train has no test rows"):
    sources.embedded_rows("test", embedded_folder(tmp_path, ("train", "train")))


def test_split_of_user_files_is_disjoint_complete_and_stable(tmp_path):
  lines = [f"prompt {i}" for i in range(1000)]
  rows = sources.read_rows(write(tmp_path / "a.txt", "\n".join(lines)), default_label=0)
  by_split = sources.split_rows(rows)
  shares = [len(by_split[split]) / len(rows) for split in sources.SPLITS]
  assert abs(shares[0] - 0.8) < 0.05 and abs(shares[1] - 0.1) < 0.04
  assert sorted(row.prompt for kept in by_split.values() for row in kept) == sorted(lines)
  fewer = sources.split_rows(rows[::-2])
  assert all({row.prompt for row in fewer[split]} <= {row.prompt for row in by_split[split]} for split in fewer)
  shouted = sources.split_rows([*(dataclasses.replace(row, prompt=f" {row.prompt.upper()}\n") for row in rows), *rows])
  folded = {split: {sources.request_key(row.prompt) for row in kept} for split, kept in shouted.items()}
  assert folded == {split: {row.prompt for row in kept} for split, kept in by_split.items()}


def test_a_file_may_say_where_its_rows_belong(tmp_path):
  line = lambda i, split: json.dumps({"prompt": f"p{i}", "label": i % 2, "split": split})
  path = write(tmp_path / "a.jsonl", "\n".join(line(i, sources.SPLITS[i % 3]) for i in range(60)))
  by_split = sources.read_splits(path)
  assert {split: {int(row.prompt[1:]) % 3 for row in rows} for split, rows in by_split.items()} == {
      "train": {0}, "validation": {1}, "test": {2}}
  other = write(tmp_path / "b.csv", "prompt,label\nP1 ,1\n")  # Equal prompts go where a file puts one.
  assert "P1 " in [row.prompt for row in sources.load_split(f"{other},{path}", "validation")]
  third = write(tmp_path / "c.csv", "prompt,label,split\nP1 ,1, Test\n")
  with pytest.raises(ValueError, match="'P1 ' is for validation in one row and for test in another, of c.csv"):
    sources.read_splits(f"{path},{third}")
  foreign = write(tmp_path / "d.csv", "prompt,label,Split\np,1,dev\n")
  assert len(sources.read_requests(foreign, "malicious")) == 1  # Nothing is trained on.
  with pytest.raises(ValueError, match="e.csv:2: two columns have one name.* of goal, prompt, Prompt"):
    sources.read_requests(write(tmp_path / "e.csv", "goal,prompt,Prompt\ng,p,q\n"), "malicious")


def test_the_subtle_set_leaves_the_embedded_test_split_alone():
  by_split = {name: sources.read_splits(name) for name in ("embedded", "subtle")}
  ideas = {name: {row.idea: split for split, rows in of.items() for row in rows} for name, of in by_split.items()}
  shared = ideas["embedded"].keys() & ideas["subtle"].keys()
  assert len(shared) > 30 and all(ideas["embedded"][idea] == ideas["subtle"][idea] for idea in shared)
  assert not checks.near_duplicates(by_split["subtle"]["train"], by_split["embedded"]["test"])


def test_a_response_of_white_space_is_none(tmp_path):
  path = write(tmp_path / "a.csv", "prompt,response,output,label\np, ,o,1\nq, , ,1\n")
  assert [row.response for row in sources.read_rows(path)] == ["o", ""]


def test_rows_of_one_idea_stay_together():
  row = lambda prompt, label, idea: sources.Row(prompt, "", label, "", "", idea)
  rows = [row(f"{word} {i}", label, f"idea {i}") for i in range(60) for label, word in enumerate(("bake", "burn"))]
  rows.append(row("bake 7", 0, "another idea"))  # An equal prompt goes where the first one is.
  split = sources.split_rows(rows)
  ideas = [{row.prompt.split()[1] for row in kept} for kept in split.values()]
  assert len(split) == 3 and sum(map(len, ideas)) == 60 == len(set.union(*ideas))


def test_load_split_of_a_file(tmp_path):
  path = write(tmp_path / "a.csv", "prompt,label\n" + "".join(f"p{i},{i % 2}\n" for i in range(60)))
  loaded = [row for split in sources.SPLITS for row in sources.load_split(path, split)]
  assert len(loaded) == 60
  with pytest.raises(ValueError, match="None of the 1 rows of .* falls into the"):
    for split in sources.SPLITS:
      sources.load_split(write(tmp_path / "b.csv", "prompt,label\np,1\n"), split)


def test_the_sets_of_the_package_stand_beside_the_embedded_one_and_files(tmp_path):
  path = write(tmp_path / "a.csv", "prompt,label\n" + "".join(f"p{i},{i % 2}\n" for i in range(60)))
  by_split = sources.read_splits(f"embedded, plain,{path}")
  beside = sources.split_rows(sources.read_rows(f"plain,{path}"))
  assert {row.source for row in beside["train"]} >= {"a.csv", "fraud.jsonl", "weapons.jsonl"}
  assert by_split == {split: sources.embedded_rows(split) + beside[split] for split in sources.SPLITS}
  assert sources.read_splits("embedded") == {split: sources.embedded_rows(split) for split in sources.SPLITS}
  assert sources.load_split("subtle,plain", "test") == sources.split_rows(sources.read_rows("subtle,plain"))["test"]


def test_draw_evenly():
  rows = [sources.Row(str(i), "", int(i < 3), "", "") for i in range(20)]
  drawn = sources.draw_evenly(rows, 5)
  assert [row.label for row in drawn].count(1) == 3 and len(drawn) == 8
  assert drawn == sources.draw_evenly(rows, 5) == sorted(drawn, key=lambda row: int(row.prompt))
  assert sources.draw_evenly(rows, 5, seed=1) != drawn
  assert sources.draw_evenly(rows, 0) == rows


def test_a_draw_of_which_a_share_has_a_response():
  rows = [sources.Row(str(i), "said" * (i % 5 == 0), i % 2, "", "") for i in range(200)]  # 20 of each label have one.
  for share, least in ((0.5, 6), (1.0, 12)):
    for seed in range(20):
      drawn = sources.draw_evenly(rows, 12, seed, share)
      assert [row.label for row in drawn].count(1) == 12 == len({row.prompt for row in drawn}) / 2
      assert all(sum(bool(row.response) for row in drawn if row.label == label) >= least for label in (0, 1))
      assert drawn == sorted(drawn, key=lambda row: int(row.prompt))
  rng = np.random.default_rng(3)  # Without a share, as it always was.
  plain = [i for label in (0, 1) for i in rng.permutation(range(label, 200, 2))[:12]]
  assert sources.draw_evenly(rows, 12, 3) == [rows[i] for i in sorted(plain)]
  assert [bool(row.response) for row in sources.draw_evenly(rows, 30, 0, 1.0)].count(True) == 40  # The rest has none.


def test_imports_neither_tfds_nor_grain():
  code = ("import sys, saess_jax.data.sources, saess_jax.data.chat; "
          "sys.exit(any(name in sys.modules for name in ('tensorflow_datasets', 'grain', 'torch')))")
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
