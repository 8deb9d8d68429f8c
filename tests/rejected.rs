//! Files that must be refused, with a message that names them, in bounded memory.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use neuroada_ckpt::{Adapter, AdapterError, Checkpoint, CheckpointError, Context, ErrorKind, Failure};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

struct Case {
    path: String,
    fragments: Vec<String>,
}

fn cases() -> Vec<Case> {
    let json: Value = serde_json::from_slice(&fs::read(fixtures().join("rejected/EXPECTED.json")).unwrap()).unwrap();
    let list = json.as_array().or_else(|| json["cases"].as_array()).unwrap().clone();
    let words = |value: &Value| value.as_str().unwrap().to_owned();
    list.iter()
        .map(|case| Case {
            path: words(&case["path"]),
            fragments: case["message"].as_array().unwrap().iter().map(words).collect(),
        })
        .collect()
}

/// Fails with all cases whose message and hint lack a fragment.
fn check(prefix: &str, expected: bool, open: impl Fn(&Path) -> Result<(), (ErrorKind, String)>) -> usize {
    let (mut wrong, mut n) = (Vec::new(), 0);
    for case in cases().into_iter().filter(|case| case.path.starts_with(prefix) == expected) {
        n += 1;
        match open(&fixtures().join("rejected").join(&case.path)) {
            Ok(()) => wrong.push(format!("{}: accepted", case.path)),
            Err((kind, message)) => {
                let lower = message.to_lowercase();
                let missing: Vec<_> =
                    case.fragments.iter().filter(|part| !lower.contains(&part.to_lowercase())).collect();
                if !missing.is_empty() || kind != ErrorKind::BadInput {
                    wrong.push(format!("{}: {kind:?}: {message}\n    lacks {missing:?}", case.path));
                }
                assert!(
                    !message.chars().any(|c| c.is_control() && c != '\n'),
                    "{}: a control byte gets out",
                    case.path
                );
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {n}:\n{}", wrong.len(), wrong.join("\n"));
    n
}

#[test]
fn every_broken_checkpoint_is_refused_with_its_message() {
    let n = check("adapter/", false, |path| {
        let said = |e: CheckpointError| (e.kind(), format!("{e}\n{}", e.hint().unwrap_or_default()));
        Checkpoint::open(path).map(|_| ()).map_err(said)
    });
    assert!(n > 90, "{n}");
}

#[test]
fn every_broken_adapter_is_refused_with_its_message() {
    let n = check("adapter/", true, |path| {
        let read = Adapter::open(path).and_then(|adapter| adapter.id(&Context::default()));
        read.map(|_| ()).map_err(|e: AdapterError| (e.kind(), e.to_string()))
    });
    assert!(n > 15, "{n}");
}

#[test]
fn an_odd_header_gives_the_same_as_an_aligned_one() {
    let open = |name: &str| Checkpoint::open(&fixtures().join("accepted").join(name)).unwrap();
    let (odd, aligned) = (open("odd-header.safetensors"), open("aligned-header.safetensors"));
    let ctx = Context::default();
    assert_eq!(odd.shards()[0].header().data_start() % 2, 1, "the data is misaligned");
    assert!(odd.tensors().len() > 0);
    for (a, b) in odd.tensors().zip(aligned.tensors()) {
        assert_eq!((&a.info.name, a.info.dtype, &a.info.shape), (&b.info.name, b.info.dtype, &b.info.shape));
        let n = a.info.n_bytes();
        assert!(*a.window(&ctx, 0..n).unwrap() == *b.window(&ctx, 0..n).unwrap());
    }
}

#[test]
fn a_truncated_download_is_reported() {
    let whole = fs::read(fixtures().join("tiny-llama/model-00002-of-00003.safetensors")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    let mut at = 12_345usize;
    for _ in 0..200 {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let len = (at >> 20) % whole.len();
        fs::write(&path, &whole[..len]).unwrap();
        let error = Checkpoint::open(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BadInput);
        let message = error.to_string();
        assert!(message.contains("incomplete") || message.contains("too short"), "{len}: {message}");
    }
}

#[test]
fn links_may_lead_only_into_the_folder_or_its_cache_s_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside.safetensors");
    fs::copy(fixtures().join("tiny-llama/model-00001-of-00003.safetensors"), &outside).unwrap();
    let folder = dir.path().join("model");
    fs::create_dir(&folder).unwrap();
    symlink(&outside, folder.join("model.safetensors")).unwrap();
    let error = Checkpoint::open(&folder).unwrap_err();
    assert!(error.to_string().contains("is a link that leads out of the folder"), "{error}");

    let repository = dir.path().join("models--a--b");
    let (blobs, snapshot) = (repository.join("blobs"), repository.join("snapshots/123"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::copy(&outside, blobs.join("abc")).unwrap();
    symlink("../../blobs/abc", snapshot.join("model.safetensors")).unwrap();
    assert!(Checkpoint::open(&snapshot).unwrap().tensors().len() > 0);
}

/// Opens the file named in the environment and prints the result and the peak resident memory.
#[test]
fn child_that_opens_a_hostile_file() {
    let Ok(path) = std::env::var("HOSTILE_FILE") else { return };
    let message = Checkpoint::open(path.as_ref()).map(|_| ()).map_err(|e| e.to_string());
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB").trim().to_owned();
    println!("said {:?}\npeak {peak}", message.map_err(|e| e.chars().take(300).collect::<String>()));
}

/// The message from opening a file, in a separate process that stays within three times the file size or 300 MB.
fn said_of(path: &Path) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_opens_a_hostile_file", "--nocapture"])
        .env("HOSTILE_FILE", path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{path:?}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let peak = text.lines().find_map(|line| line.strip_prefix("peak ")).unwrap();
    let kib: u64 = peak.trim_end_matches(" kB").parse().unwrap();
    let most = (3 * fs::metadata(path).unwrap().len()).max(300_000_000);
    assert!(kib * 1024 <= most, "{path:?}: {kib} KiB resident");
    text.lines().find_map(|line| line.strip_prefix("said ")).unwrap().to_owned()
}

/// A safetensors file whose header is `head`, then `part` until the header is full, then `tail`.
fn write_header(path: &Path, head: &str, mut part: impl FnMut(usize) -> String, tail: &str, n_bytes: usize) {
    let mut json = head.to_owned();
    let mut i = 0;
    loop {
        let next = part(i);
        if json.len() + next.len() + tail.len() > n_bytes {
            break;
        }
        json += &next;
        i += 1;
    }
    json += tail;
    let mut file = fs::File::create(path).unwrap();
    file.write_all(&(json.len() as u64).to_le_bytes()).unwrap();
    file.write_all(json.as_bytes()).unwrap();
}

#[test]
fn headers_of_a_hundred_megabytes_cost_no_more_than_three_times_that() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hostile.safetensors");
    const FULL: usize = 100_000_000;
    let comma = |i: usize| if i == 0 { "" } else { "," };
    let entry = |shape: &str| format!(r#"{{"dtype":"U8","shape":{shape},"data_offsets":[0,0]}}"#);
    let last = format!(r#""z":{}}}"#, entry("[0]"));

    write_header(&path, "{", |i| format!(r#""{i}":{},"#, entry("[0]")), &last, FULL);
    let message = said_of(&path);
    assert!(message.contains("more than 1000000 tensors") || message.contains("bytes of memory"), "{message}");

    write_header(
        &path,
        r#"{"a":{"dtype":"U8","shape":["#,
        |i| format!("{}1", comma(i)),
        r#"],"data_offsets":[0,1]}}"#,
        FULL,
    );
    let message = said_of(&path);
    assert!(message.contains("shape has more than 64 numbers"), "{message}");

    let tail = format!("}},{last}");
    write_header(&path, r#"{"__metadata__":{"#, |i| format!(r#"{}"{i}":"""#, comma(i)), &tail, FULL);
    let message = said_of(&path);
    assert!(message.contains("bytes of memory") || message == "Ok(())", "{message}");

    let long = "x".repeat(1 << 20);
    let tail = format!(r#"":{}}}"#, entry("[1]"));
    write_header(&path, "{\"", |i| if i == 0 { long.clone() } else { "y".repeat(FULL) }, &tail, 2 << 20);
    let message = said_of(&path);
    assert!(message.contains("xxx… (1048576 bytes)") && message.len() < 1000, "{message}");

    for depth in [200, 1_000_000] {
        write_header(&path, r#"{"a":"#, |i| if i == 0 { "[".repeat(depth) } else { "[".repeat(FULL) }, "", 8 << 20);
        assert!(said_of(&path).contains("malformed"), "{depth} deep");
    }
}

/// A checkpoint of `names` with `n` elements each, as a sparse file.
fn sparse(path: &Path, n_tensors: u64, n_elements: u64) -> u64 {
    let entry = |i: u64| {
        let (begin, end) = (2 * i * n_elements, 2 * (i + 1) * n_elements);
        format!(
            r#""t{i}.weight":{{"dtype":"BF16","shape":[{},4096],"data_offsets":[{begin},{end}]}}"#,
            n_elements / 4096
        )
    };
    let json = format!("{{{}}}", (0..n_tensors).map(entry).collect::<Vec<_>>().join(","));
    fs::write(path, [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat()).unwrap();
    let start = 8 + json.len() as u64;
    fs::File::options().write(true).open(path).unwrap().set_len(start + 2 * n_tensors * n_elements).unwrap();
    start
}

#[test]
fn offsets_past_2_to_the_40_and_tensors_past_2_to_the_32_are_right() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.safetensors");
    // 300 tensors of 2^33 elements: a sparse file of 4.7 TiB, if the file system supports it.
    let n_elements = 1u64 << 33;
    let too_long = fs::File::create(&path).unwrap().set_len(1 << 43).is_err();
    if too_long {
        eprintln!("skipped: the file system has no files of 2^43 bytes");
        return;
    }
    let start = sparse(&path, 300, n_elements);
    let at = 2 * (299 * n_elements + n_elements - 3);
    fs::File::options().write(true).open(&path).unwrap().write_all_at(&[1, 2, 3, 4], start + at).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.n_parameters(), 300 * n_elements);
    let tensor = checkpoint.tensor("t299.weight").unwrap();
    let far = 2 * (n_elements - 3);
    assert_eq!(*tensor.window(&Context::default(), far..far + 6).unwrap(), [1, 2, 3, 4, 0, 0]);
    assert!(said_of(&path) == "Ok(())");
}
