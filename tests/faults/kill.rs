//! Kills and Ctrl-C at random moments.

use std::{
    fs,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{
    cycles, program, run,
    scenarios::{self, N_KINDS, SPARSE, Scenario, shards},
};
use crate::world::{Random, World, tree};

fn spawn(arguments: &[String]) -> Child {
    Command::new(program())
        .args(["--threads", "1", "-q"])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// How long a command takes when nobody disturbs it.
fn duration(world: &World, scenario: &Scenario) -> Duration {
    let path = world.at("timed");
    scenario.prepare(world, &path);
    let began = Instant::now();
    assert!(run(&scenario.arguments(world, &path)).status.success());
    fs::remove_dir_all(&path).unwrap();
    began.elapsed()
}

#[test]
fn kills_at_random_moments_lose_nothing() {
    kill_at_random(&World::new(), &SPARSE);
}

#[test]

fn kills_of_lora_in_place_lose_nothing() {
    kill_at_random(&scenarios::world_with_lora(), &scenarios::lora());
}

fn kill_at_random(world: &World, scenarios: &[Scenario]) {
    let mut random = Random(5);
    for scenario in scenarios {
        let states = scenario.states(world);
        let longest = duration(world, scenario).as_micros() as u64 + 1;
        let path = world.at("work");
        scenario.prepare(world, &path);
        let mut at = 0;
        for _ in 0..cycles(24).min(300) / N_KINDS / scenarios.len() as u64 {
            if at == 1 {
                fs::remove_dir_all(&path).unwrap();
                scenario.prepare(world, &path);
            }
            let mut child = spawn(&scenario.arguments(world, &path));
            thread::sleep(Duration::from_micros(random.below(longest)));
            child.kill().unwrap();
            child.wait().unwrap();
            // One time in two the recovery is killed as well.
            if random.below(2) == 0 {
                let mut child = spawn(&scenario.recover_line(world, &path));
                thread::sleep(Duration::from_micros(random.below(longest / 2)));
                child.kill().unwrap();
                child.wait().unwrap();
            }
            at = scenario.check_recovers(world, &path, &states, scenario.name);
        }
        fs::remove_dir_all(&path).unwrap();
    }
}

#[test]
fn a_signal_stops_within_a_second_and_changes_nothing() {
    let world = World::new();
    let mut random = Random(6);
    let longest = duration(&world, &SPARSE[0]).as_micros() as u64 + 1;
    for signal in ["INT", "TERM", "HUP"] {
        for _ in 0..4 {
            let out = world.at("out");
            let before = tree(world.dir.path());
            let mut arguments = SPARSE[0].arguments(&world, &world.base());
            arguments[2] = format!("--output={}", out.display());
            let mut child = spawn(&arguments);
            thread::sleep(Duration::from_micros(random.below(longest)));
            let began = Instant::now();
            super::works("kill", &[&format!("-{signal}"), &child.id().to_string()]);
            let status = child.wait().unwrap();
            // A command that was about to end, or had not begun to listen.
            if status.success() || status.code().is_none() {
                let _may_be_absent = fs::remove_dir_all(&out);
                continue;
            }
            assert_eq!(status.code(), Some(130), "{signal}");
            assert!(began.elapsed() < Duration::from_secs(10), "{signal}: it stops soon");
            assert!(tree(world.dir.path()) == before, "{signal}: nothing is left behind");
        }
    }
    assert_eq!(shards(&world.base()), SPARSE[0].states(&world)[0]);
}

#[test]
fn the_second_of_two_commands_is_told_who_the_first_is() {
    let world = World::new();
    let path = world.at("work");
    SPARSE[0].prepare(&world, &path);
    let first = path.join("model-00001-of-00002.safetensors");
    // A shell that holds the lock as a running merge would.
    if !super::works("flock", &["--version"]) {
        return super::skipped("flock is not installed");
    }
    let mut holder = Command::new("flock").arg(&first).args(["sleep", "30"]).spawn().unwrap();
    let before = tree(&path);
    let mut output = run(&SPARSE[0].arguments(&world, &path));
    // The holder may need a moment to begin.
    for _ in 0..50 {
        if !output.status.success() {
            break;
        }
        run(&["unmerge".to_owned(), path.display().to_string(), "--in-place".to_owned()]);
        thread::sleep(Duration::from_millis(20));
        output = run(&SPARSE[0].arguments(&world, &path));
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(said.contains("is changing it"), "{said}");
    assert!(tree(&path) == before);
    holder.kill().unwrap();
    holder.wait().unwrap();
    // `sleep` inherited the lock.
    super::works("pkill", &["-P", &holder.id().to_string()]);
}
