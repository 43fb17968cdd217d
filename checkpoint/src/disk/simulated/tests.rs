use super::*;

fn write(disk: &SimulatedDisk, path: &str, synced: bool) {
    let mut file = disk.create(Path::new(path)).unwrap();
    file.write_all(b"abcd").unwrap();
    if synced {
        file.sync().unwrap();
    }
}

#[test]
fn a_crash_keeps_synced_bytes_under_synced_names_only() {
    let disk = SimulatedDisk::new();
    write(&disk, "/kept", true);
    write(&disk, "/hollow", false);
    disk.sync_dir(Path::new("/")).unwrap();
    write(&disk, "/nameless", true);
    disk.rename(Path::new("/kept"), Path::new("/renamed")).unwrap();
    let after = disk.after_crash();
    assert_eq!(after.list(Path::new("/")).unwrap(), ["hollow", "kept"]);
    assert_eq!(after.read(Path::new("/kept")).unwrap(), b"abcd");
    assert_eq!(after.read(Path::new("/hollow")).unwrap(), b"");
    assert_eq!(disk.after_kill().list(Path::new("/")).unwrap(), ["hollow", "nameless", "renamed"]);
    disk.sync_dir(Path::new("/")).unwrap();
    assert_eq!(disk.after_crash().list(Path::new("/")).unwrap(), ["hollow", "nameless", "renamed"]);
}

#[test]
fn what_a_removal_took_does_not_come_back() {
    let disk = SimulatedDisk::new();
    disk.create_dir(Path::new("/a")).unwrap();
    write(&disk, "/a/file", true);
    disk.sync_dir(Path::new("/a")).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk.rename(Path::new("/a"), Path::new("/b")).unwrap();
    disk.remove_dir_all(Path::new("/b")).unwrap();
    assert_eq!(disk.after_crash().list(Path::new("/a")).unwrap(), Vec::<String>::new());
}

#[test]
fn a_removed_file_comes_back_until_its_folder_is_synced() {
    let disk = SimulatedDisk::new();
    write(&disk, "/file", true);
    disk.sync_dir(Path::new("/")).unwrap();
    disk.remove_file(Path::new("/file")).unwrap();
    assert!(disk.list(Path::new("/")).unwrap().is_empty());
    assert_eq!(disk.after_crash().read(Path::new("/file")).unwrap(), b"abcd");
    disk.sync_dir(Path::new("/")).unwrap();
    assert!(disk.after_crash().list(Path::new("/")).unwrap().is_empty());
}

#[test]
fn planned_faults_hit_their_operation_and_a_crash_all_that_follow() {
    let disk = SimulatedDisk::new();
    disk.fail_at(1, io::ErrorKind::StorageFull);
    disk.crash_at(3);
    let mut file = disk.create(Path::new("/file")).unwrap();
    assert_eq!(file.write_all(b"abcd").unwrap_err().kind(), io::ErrorKind::StorageFull);
    file.sync().unwrap();
    assert!(disk.list(Path::new("/")).is_err() && file.sync().is_err());
    assert_eq!(disk.operations(), 5);
    assert_eq!(disk.after_kill().read(Path::new("/file")).unwrap(), b"ab");
}

/// What `after_crash_in_disorder` may leave of a file whose first `synced` sectors were synced and whose others were not.
#[test]
fn what_was_not_synced_reaches_the_disk_in_any_order_and_torn() {
    let (old, new) = (vec![1; 700], vec![2; 2000]);
    let disk = SimulatedDisk::new();
    let mut file = disk.create(Path::new("/file")).unwrap();
    file.write_all(&old).unwrap();
    file.sync().unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    file.write_all(&new).unwrap();
    let whole = [old.clone(), new].concat();
    let (mut torn, mut later_alone, mut cut) = (false, false, false);
    for seed in 0..200 {
        let left = disk.after_crash_in_disorder(seed).read(Path::new("/file")).unwrap();
        assert_eq!(left, disk.after_crash_in_disorder(seed).read(Path::new("/file")).unwrap(), "a seed repeats itself");
        assert_eq!(left[..700], old, "what was synced stays");
        assert!(left.iter().zip(&whole).all(|(left, whole)| left == whole || *left == 0));
        let landed = |at: usize| left.get(at).is_some_and(|&byte| byte == 2);
        torn |= landed(1024) && left.len() >= 1536 && !landed(1535);
        later_alone |= !landed(1024) && landed(1536);
        cut |= left.len() < whole.len();
    }
    assert!(torn && later_alone && cut);
    file.sync().unwrap();
    assert!((0..20).all(|seed| disk.after_crash_in_disorder(seed).read(Path::new("/file")).unwrap() == whole));
}

#[test]
fn names_that_were_not_synced_are_there_in_any_combination() {
    let disk = SimulatedDisk::new();
    write(&disk, "/a", true);
    disk.sync_dir(Path::new("/")).unwrap();
    write(&disk, "/b", true);
    disk.rename(Path::new("/a"), Path::new("/c")).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..50 {
        seen.insert(disk.after_crash_in_disorder(seed).list(Path::new("/")).unwrap().concat());
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["a", "ab", "bc", "c"], "a rename is whole or not at all");
}

#[test]
fn a_short_write_is_written_on_and_a_failed_sync_is_never_made_good() {
    let disk = SimulatedDisk::new();
    disk.short_at(1);
    disk.fail_at(4, io::ErrorKind::Other);
    let mut file = disk.create(Path::new("/file")).unwrap();
    file.write_all(b"abcd").unwrap();
    assert_eq!(disk.operations(), 3, "two calls wrote it");
    assert_eq!(disk.after_kill().read(Path::new("/file")).unwrap(), b"abcd");
    disk.sync_dir(Path::new("/")).unwrap();
    assert!(file.sync().is_err());
    file.sync().unwrap();
    assert_eq!(disk.after_crash().read(Path::new("/file")).unwrap(), b"");
}
