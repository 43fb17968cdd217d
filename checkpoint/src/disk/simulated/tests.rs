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
