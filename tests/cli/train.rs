use std::fs;

use insta::assert_snapshot;

use super::Place;

const DATA: &str = "--data [FIXTURES]/data/commonsense.jsonl --batch-size 4 --batch-tokens 1000 --epochs 2 --seed 3";

#[test]
fn training_writes_an_adapter_that_merges() {
    let place = Place::new();
    let line =
        format!("train [FIXTURES]/tiny-llama -k 2 {DATA} --eval-data [FIXTURES]/data/commonsense.jsonl --license MIT");
    let told = place.run(&format!("{line} -o a.safetensors"));
    let (stdout, stderr) = told.split_once("--- stderr\n").unwrap();
    assert_snapshot!(stdout.lines().filter(|line| !line.starts_with("adapter")).collect::<Vec<_>>().join("\n"), @"");
    for words in [
        "commonsense.jsonl: 18 examples (commonsense), 4,850 tokens, 491 of them learned, the longest has 371",
        "model      tiny-llama (llama, 2 layers of 64, 126,272 parameters)",
        "trainable  2,432 deltas, 1.93 % of the parameters",
        "step 0  evaluation loss 5.5",
        ", the best so far",
    ] {
        assert!(stderr.contains(words), "{words}\n{stderr}");
    }
    assert_eq!(place.files(), ["a.log.jsonl", "a.loss.svg", "a.safetensors"]);
    let report = place.json(&format!("{line} -o b.safetensors -q"));
    assert!(report["eval_loss"].as_f64() < report["first_eval_loss"].as_f64(), "{report}");
    assert_eq!(fs::read(place.path("a.safetensors")).unwrap(), fs::read(place.path("b.safetensors")).unwrap());
    let notes = &place.json("inspect a.safetensors")["sparse"]["notes"];
    assert_eq!(notes["license"], "MIT");
    assert_eq!(notes["training"]["data"]["name"], "commonsense.jsonl");
    assert_eq!(notes["training"]["options"]["seed"], 3);
    assert_eq!(notes["training"]["result"]["eval_loss"], report["eval_loss"]);
    place.stdout("merge [FIXTURES]/tiny-llama --adapter a.safetensors -o merged");
    place.stdout("verify merged --base [FIXTURES]/tiny-llama");
}

#[test]
fn what_a_run_takes_is_told_without_training() {
    let place = Place::new();
    let line = format!("train [FIXTURES]/tiny-llama -k 2 {DATA} -o a.safetensors --dry-run");
    assert_snapshot!(place.run(&format!("{line} --layer-checkpoints")), @"");
    let start = place.json(&line);
    assert_eq!((&start["n_trained"], &start["n_steps"]), (&2432.into(), &12.into()));
    assert_eq!(place.files(), [""; 0]);
}

#[test]
fn a_run_that_cannot_be_is_refused_first() {
    let place = Place::new();
    place.write("a.safetensors", "here already");
    assert_snapshot!(place.run(&format!("train [FIXTURES]/tiny-llama -k 1 {DATA} -o a.safetensors -q")), @"");
    assert_snapshot!(place.run(&format!("train [FIXTURES]/tiny-llama -k 1 {DATA} -o b.safetensors --lr -1 -q")), @"");
    assert_snapshot!(place.run("train [FIXTURES]/tiny-llama -k 1 --data none.json -o b.safetensors -q"), @"");
    assert_snapshot!(place.run(&format!("train [FIXTURES]/tiny-llama {DATA} -o b.safetensors")), @"");
    assert_snapshot!(place.run(&format!("train [FIXTURES]/tiny-llama -k 1 --max-length 2 {DATA} -o b.safetensors -q")), @"");
    let base = place.copy_fixture("tiny-llama").join("config.json");
    let config = fs::read_to_string(&base).unwrap();
    fs::write(&base, config.replace("\"model_type\": \"llama\"", "\"model_type\": \"mamba\"")).unwrap();
    assert_snapshot!(place.run(&format!("train tiny-llama -k 1 {DATA} -o b.safetensors -q")), @"");
    assert_eq!(fs::read(place.path("a.safetensors")).unwrap(), b"here already");
}
