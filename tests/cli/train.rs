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
    assert!(stdout.starts_with("exit: 0\n--- stdout\nadapter     "), "{told}");
    for words in ["\ntrained     2,432 deltas in 12 steps, 9,700 tokens\n", "\nloss        5.3", "\nevaluation  5.3"] {
        assert!(stdout.contains(words), "{words}\n{told}");
    }
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
    let told = place.run("inspect a.safetensors");
    assert!(told.contains("\ntraining     12 steps on commonsense.jsonl, loss 5.3"), "{told}");
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
    assert_snapshot!(place.run(&format!("{line} --layer-checkpoints")), @r"
    exit: 0
    --- stdout
    model      tiny-llama (llama, 2 layers of 64, 126,272 parameters)
    trainable  2,432 deltas, 1.93 % of the parameters
    memory     8.14 MB: weights 253 kB, activations 7.83 MB, state 58.4 kB
    steps      12 of 808 tokens each, a batch has 998 at most
    --- stderr
    commonsense.jsonl: 18 examples (commonsense), 4,850 tokens, 491 of them learned, the longest has 371
    ");
    let start = place.json(&line);
    assert_eq!((&start["n_trained"], &start["n_steps"]), (&2432.into(), &12.into()));
    assert_eq!(place.files(), [""; 0]);
}

#[test]
fn a_run_that_cannot_be_is_refused_first() {
    let place = Place::new();
    place.write("a.safetensors", "here already");
    let run = |line: &str| place.run(&format!("train {line} -q"));
    assert_snapshot!(run(&format!("[FIXTURES]/tiny-llama -k 1 {DATA} -o a.safetensors")), @r"
    exit: 4
    --- stdout
    --- stderr
    error: a.safetensors exists already
    hint: --force replaces it
    ");
    assert_snapshot!(run(&format!("[FIXTURES]/tiny-llama -k 1 {DATA} -o b.safetensors --lr 0")), @r"
    exit: 2
    --- stdout
    --- stderr
    error: learning rate: positive is needed
    ");
    assert_snapshot!(run("[FIXTURES]/tiny-llama -k 1 --data none.json -o b.safetensors"), @r"
    exit: 5
    --- stdout
    --- stderr
    error: cannot read `none.json`: No such file or directory (os error 2)
    ");
    let config = place.copy_fixture("tiny-llama").join("config.json");
    let other = fs::read_to_string(&config).unwrap().replace("\"llama\"", "\"mamba\"");
    fs::write(&config, other).unwrap();
    assert_snapshot!(run(&format!("tiny-llama -k 1 {DATA} -o b.safetensors")), @r"
    exit: 4
    --- stdout
    --- stderr
    error: tiny-llama: model type `mamba` cannot be trained; llama, mistral, qwen2, qwen3 can
    ");
    assert_eq!(fs::read(place.path("a.safetensors")).unwrap(), b"here already");
}
